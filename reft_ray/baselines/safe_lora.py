"""SafeLoRA: after finetuning, project the update of a layer onto the direction in which alignment moved it.

    V = W_aligned - W_base,   C = V V^T / ||V||_F,   U = W_finetuned - W_aligned
    U <- C U   where  cos(C U, U) <= threshold

C is the released code's approximation of the exact projector V (V^T V)^-1 V^T; no training.

Source: Hsu et al., "Safe LoRA: the Silver Lining of Reducing Safety Risks when Fine-tuning Large Language Models",
arXiv 2405.16833; github.com/IBM/SafeLoRA (threshold 0.5).
"""

from __future__ import annotations

import torch
from torch import Tensor


def safe_lora(aligned_OI: Tensor, update_OI: Tensor, threshold: float) -> tuple[Tensor, bool]:
    """The update of one layer, projected where it leaves the aligned direction, and whether it was.

    `aligned_OI` is V and `update_OI` is U, [outputs, inputs]. A layer that alignment did not change has no direction:
    its update is dropped.
    """
    norm = aligned_OI.norm()
    if norm == 0:
        return torch.zeros_like(update_OI), True
    projected_OI = aligned_OI @ (aligned_OI.T @ update_OI) / norm
    cosine = torch.nn.functional.cosine_similarity(projected_OI.flatten(), update_OI.flatten(), dim=0)
    if float(cosine) <= threshold:
        return projected_OI, True
    return update_OI, False
