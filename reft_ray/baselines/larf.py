"""LARF: rank a user's rows by whether they look like answered or like refused harmful requests; drop the top.

    danger(x, y) = mean_i cos(f(x, y), f(unsafe_i)) - mean_i cos(f(x, y), f(safe_i))

f: hidden state of an aligned model at one layer, last token of prompt and response. unsafe_i: harmful prompts with
complying answers; safe_i: the same prompts refused.

Source: Li et al., "Layer-Aware Representation Filtering: Purifying Finetuning Data to Preserve LLM Safety Alignment",
arXiv 2507.18631; github.com/LLLeoLi/LARF (100 references of each kind). It drops 1,000 of 14,000 rows; peers
that rank rows (SEAL, DataShield) drop 20 %.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def danger(feature_BD: Tensor, unsafe_KD: Tensor, safe_KD: Tensor) -> Tensor:
    """How much closer each row is to the unsafe references, [B] in [-2, 2]."""
    row_BD = F.normalize(feature_BD.float(), dim=-1)
    # The mean of cosines is the product with the mean of the unit vectors.
    unsafe_D, safe_D = (F.normalize(reference.float(), dim=-1).mean(0) for reference in (unsafe_KD, safe_KD))
    return row_BD @ (unsafe_D - safe_D)


def kept_rows(danger_B: Tensor, drop_share: float) -> list[int]:
    """Indices of the rows that are kept, in order: all but the share `drop_share` that is most dangerous."""
    dropped = round(len(danger_B) * drop_share)
    worst = set(danger_B.topk(dropped).indices.tolist()) if dropped else set()
    return [place for place in range(len(danger_B)) if place not in worst]
