"""Prompt features at several layers from one pass, and the scores computed from them.

Shape suffixes: B prompts, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from reft_ray.core.batch import TokenizedExample, collate, token_batches
from reft_ray.core.conversation import Label
from reft_ray.core.refusal import ClassSums, prompt_feature, refusal_score
from reft_ray.hf.forward import captured_layer


@torch.no_grad()
def prompt_features(
    model: nn.Module,
    prompts: Sequence[TokenizedExample],
    layers: Sequence[int],
    pad_id: int,
    device: torch.device | str = "cpu",
    max_tokens: int = 8192,
) -> dict[int, Tensor]:
    """f_l of every prompt in order, {layer: [B, D] float32 on the CPU}; the layers above the highest are not run."""
    rows = [row.prompt_only() for row in prompts]
    top = max(layers)
    out: dict[int, Tensor] = {}
    for indices in token_batches([len(row) for row in rows], max_tokens):
        batch = collate([rows[i] for i in indices], pad_id, device)
        captured = {}
        with ExitStack() as stack:
            # The highest layer is entered last and left first: its stop must not pass through the others' contexts.
            for layer in sorted(layers):
                captured[layer] = stack.enter_context(captured_layer(model, layer, stop=layer == top))
            model(input_ids=batch.ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
        for layer, hidden in captured.items():
            feature_BD = prompt_feature(hidden[0], batch.last_prompt_index_B).float().cpu()
            if layer not in out:
                out[layer] = torch.empty(len(rows), feature_BD.shape[-1])
            out[layer][indices] = feature_BD
    return out


def labels_of(prompts: Sequence[TokenizedExample]) -> Tensor:
    """1 for harmful, 0 for harmless, -1 for unlabelled; [B]."""
    return torch.tensor([{Label.HARMFUL: 1, Label.HARMLESS: 0}.get(row.label, -1) for row in prompts])  # type: ignore[arg-type]


def refusal_of(feature_BD: Tensor, label_B: Tensor) -> Tensor:
    """R_l from the features of labelled prompts, [D]."""
    return ClassSums(feature_BD, label_B).refusal()


def scores_by_layer(
    reference: dict[int, Tensor], reference_label_B: Tensor, prompts: dict[int, Tensor]
) -> dict[int, tuple[Tensor, Tensor]]:
    """For each layer: R_l [D] from the reference prompts, and s(x) [B] of the other prompts."""
    out = {}
    for layer, feature_BD in prompts.items():
        refusal_D = refusal_of(reference[layer], reference_label_B)
        out[layer] = (refusal_D, refusal_score(feature_BD, refusal_D))
    return out
