"""Prompt features at several layers from one pass, and the readouts fitted to them.

Shape suffixes: B prompts, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from reft_ray.core.batch import Batch, TokenizedExample, collate, dummy_batch, token_batches
from reft_ray.core.conversation import Label
from reft_ray.core.geometry import ClassMoments, Geometry, Readout
from reft_ray.hf.forward import captured_layer


@torch.no_grad()
def prompt_features(
    model: nn.Module,
    prompts: Sequence[TokenizedExample],
    layers: Sequence[int],
    pad_id: int,
    device: torch.device | str = "cpu",
    max_tokens: int = 2048,
    progress: Callable[[int, float], None] | None = None,
    passes: Callable[[int], int] | None = None,
) -> dict[int, Tensor]:
    """f_l of every prompt in order, {layer: [B, D] float32 on the CPU}; the layers above the highest are not run.

    `progress` is called after each batch with the prompts done, and the share of all tokens done. Of a sharded model
    `passes` says how many passes every rank runs, from the number that this one needs.
    """

    def run(batch: Batch) -> dict[int, list[Tensor]]:
        captured = {}
        with ExitStack() as stack:
            # The highest layer is entered last and left first: its stop must not pass through the others' contexts.
            for layer in sorted(layers):
                captured[layer] = stack.enter_context(captured_layer(model, layer, stop=layer == top))
            model(input_ids=batch.ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
        return captured

    rows = [row.prompt_only() for row in prompts]
    top = max(layers)
    out: dict[int, Tensor] = {layer: torch.empty(0) for layer in layers}
    prompts_done, tokens_done, tokens = 0, 0, sum(map(len, rows))
    groups = list(token_batches([len(row) for row in rows], max_tokens))
    # The ranks agree before the first of them is ahead of the others.
    idle = passes(len(groups)) - len(groups) if passes else 0
    for indices in groups:
        batch = collate([rows[i] for i in indices], pad_id, device)
        for layer, hidden in run(batch).items():
            feature_BD = batch.prompt_ends(hidden[0]).float().cpu()
            if len(out[layer]) != len(rows):
                out[layer] = torch.empty(len(rows), feature_BD.shape[-1])
            out[layer][indices] = feature_BD
        prompts_done += len(indices)
        tokens_done += sum(len(rows[i]) for i in indices)
        if progress:
            progress(prompts_done, tokens_done / tokens)
    for _ in range(idle):
        run(dummy_batch(pad_id, device))
    return out


def labels_of(prompts: Sequence[TokenizedExample]) -> Tensor:
    """1 for harmful, 0 for harmless, -1 for unlabelled; [B]."""
    return torch.tensor([{Label.HARMFUL: 1, Label.HARMLESS: 0}.get(row.label, -1) for row in prompts])  # type: ignore[arg-type]


def moments_by_layer(features: Mapping[int, Tensor], label_B: Tensor, width: int) -> dict[int, ClassMoments]:
    """The class moments of each layer's features, [B, D] with D = `width`."""
    return {layer: ClassMoments(width).add(x_BD, label_B) for layer, x_BD in features.items()}


def fit_readouts(
    reference: Mapping[int, Tensor], label_B: Tensor, geometry: Geometry, shrinkage: float = 0.2
) -> dict[int, Readout]:
    """A readout per layer from the features of labelled reference prompts."""
    width = next(iter(reference.values())).shape[-1]
    moments = moments_by_layer(reference, label_B, width)
    return {layer: Readout.fit(found, geometry, shrinkage) for layer, found in moments.items()}
