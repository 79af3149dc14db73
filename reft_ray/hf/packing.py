"""Attention in training: of rows packed end to end in one line, and in float32 on a CPU.

Shape suffixes: H heads, G key-value heads, T tokens, D width of a head.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from reft_ray.core.batch import Batch, TokenizedExample, collate, pack
from reft_ray.hf.loading import text_config

try:  # Since PyTorch 2.10, with windows since 2.11.
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover - depends on the version
    varlen_attn = None  # type: ignore[assignment]

ATTENTION = "packed"
FLOAT32_ATTENTION = "sdpa_float32"
_REPLACED = {"sdpa", ATTENTION, FLOAT32_ATTENTION}
_LAYERS = {"full_attention", "sliding_attention"}
_NO_MASK = torch.ones(1, 1, 1, 1, dtype=torch.bool)
_HALF = (torch.bfloat16, torch.float16)
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def packed_attention(
    module: nn.Module,
    query_1HTD: Tensor,
    key_1GTD: Tensor,
    value_1GTD: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a packed line, [1, T, H, D]; without packing, PyTorch's own.

    On a GPU one FlashAttention kernel of PyTorch's runs all rows. Elsewhere they run one by one, or all under the mask
    of a line with a shared prefix.
    """
    if cu_seq_lens_q is not None and attention_mask is not None and attention_mask.shape[-1] > 1:
        # A shared prefix: from here on it is attention under a mask.
        attention_mask = _within(attention_mask, sliding_window) if sliding_window else attention_mask
        cu_seq_lens_q = None
    if cu_seq_lens_q is None or max_length_q is None:
        options |= {"scaling": scaling, "sliding_window": sliding_window}
        attend = float32_attention if query_1HTD.device.type == "cpu" else sdpa_attention_forward
        return attend(module, query_1HTD, key_1GTD, value_1GTD, attention_mask, **options)
    query, key, value = (states[0].transpose(0, 1) for states in (query_1HTD, key_1GTD, value_1GTD))
    half = _half(query, value)
    if half is None or varlen_attn is None:
        ends: list[int] = cu_seq_lens_q.tolist()
        rows = [_row_attention(query[a:b], key[a:b], value[a:b], scaling, sliding_window) for a, b in pairwise(ends)]
        return torch.cat(rows)[None], None
    lengths = (cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q)
    window = (sliding_window - 1 if sliding_window else -1, 0)
    options = {"scale": scaling, "window_size": window}
    if query.shape[1] != key.shape[1] and _GROUPED:
        options["enable_gqa"] = True
    found = varlen_attn(query.to(half), key.to(half), value.to(half), *lengths, **options)
    assert isinstance(found, Tensor)  # it returns more only where it is asked to
    return found[None], None


_GROUPED = varlen_attn is not None and "enable_gqa" in inspect.signature(varlen_attn).parameters


def _half(query: Tensor, value: Tensor) -> torch.dtype | None:
    """The half precision of this pass on a GPU, under autocast too; None for any other."""
    if not query.is_cuda:
        return None
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    return dtype if dtype in _HALF else None


def _within(mask_11TT: Tensor, window: int) -> Tensor:
    """A mask of rows with a shared prefix, without the tokens further back in a row than a window reaches."""
    # A token sees itself and all before it in its row.
    position_11T = mask_11TT.sum(-1)
    return mask_11TT & (position_11T[..., :, None] - position_11T[..., None, :] < window)


def _row_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """Causal attention of one row, [T, H, D]."""
    tokens = len(query)
    near = None
    if window and tokens > window:
        at = torch.arange(tokens, device=query.device)
        near = (at[:, None] >= at[None, :]) & (at[:, None] - at[None, :] < window)
    query, key, value = (states.transpose(0, 1)[None] for states in (query, key, value))
    found = F.scaled_dot_product_attention(
        query, key, value, attn_mask=near, is_causal=near is None, scale=scaling, enable_gqa=True
    )
    return found[0].transpose(0, 1)


def float32_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """PyTorch's attention in float32, whatever autocast says, [B, T, H, D].

    On a CPU its backward pass in bfloat16 takes seven times as long.
    """
    with torch.autocast(query.device.type, enabled=False):
        wide = (query.float(), key.float(), value.float())
        found, _ = sdpa_attention_forward(module, *wide, attention_mask, **options)
    return found.to(value.dtype), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionInterface.register(FLOAT32_ATTENTION, float32_attention)
for _name in (ATTENTION, FLOAT32_ATTENTION):
    AttentionMaskInterface.register(_name, sdpa_mask)


def is_fast(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether one kernel attends within all rows of a line: on a GPU, in half precision."""
    return varlen_attn is not None and torch.device(device).type == "cuda" and dtype in _HALF


def packed_inputs(batch: Batch) -> dict[str, Any]:
    """A model's inputs for a packed batch, besides the tokens."""
    packing = batch.packing
    assert packing is not None, "a padded batch has no packing"
    return {
        "position_ids": packing.position_1T,
        # A mask of four dimensions is taken as it is; where attention reads the ends, the model makes none.
        "attention_mask": _NO_MASK.to(batch.ids_BT.device) if packing.mask_TT is None else packing.mask_TT[None, None],
        "cu_seq_lens_q": packing.ends,
        "cu_seq_lens_k": packing.ends,
        "max_length_q": packing.longest,
        "max_length_k": packing.longest,
    }


def enable_packing(bare: PreTrainedModel, model: nn.Module | None = None) -> bool:
    """Let a model read packed batches, if it then computes what it computes without packing; returns whether it does.

    Not so where layers carry a state along the line (Mamba, linear attention), cap their attention's logits, or look at
    chunks. The check runs two short rows both ways through `model`, the same one as a run wraps it.
    """
    config, before = text_config(bare), bare.config._attn_implementation
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - _LAYERS or getattr(config, "attn_logit_softcapping", None) or before not in _REPLACED:
        return False
    bare.set_attn_implementation(ATTENTION)
    try:
        exact = _equal_both_ways(bare if model is None else model, int(config.vocab_size))
    except (TypeError, ValueError, RuntimeError):
        exact = False
    if not exact:
        bare.set_attn_implementation(before)
    return exact


def _equal_both_ways(model: nn.Module, vocabulary: int) -> bool:
    """Whether the logits of packed rows are those of the same rows padded, and have a gradient."""
    device, training = next(model.parameters()).device, model.training
    ids = torch.randint(0, vocabulary, (12,), generator=torch.Generator().manual_seed(0)).tolist()
    shared = ids[:3]
    answers = (ids[3:7], ids[7:])
    rows = [
        TokenizedExample(shared + answer, [False] * (len(shared) + 1) + [True] * (len(answer) - 1), len(shared))
        for answer in answers
    ]
    padded, packed = collate(rows, 0, device), pack(rows, device, None if device.type == "cuda" else len(shared))
    # Of sharded parameters there is no gradient outside of a whole backward pass.
    learned = next((p for p in model.parameters() if p.requires_grad and not isinstance(p, DTensor)), None)
    model.eval()
    try:
        with torch.no_grad():
            plain = model(input_ids=padded.ids_BT, attention_mask=padded.attention_mask_BT, use_cache=False).logits
        found = model(input_ids=packed.ids_BT, use_cache=False, **packed_inputs(packed)).logits
        if learned is not None:
            torch.autograd.grad(found.float().sum(), learned)
    finally:
        model.train(training)
    expected, mine = padded.learned(plain).float(), packed.learned(found.detach()).float()
    return bool((mine - expected).norm() <= _TOLERANCE.get(plain.dtype, 1e-3) * expected.norm())
