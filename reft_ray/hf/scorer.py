"""The verdict as cheap as the mathematics allows: layers 1..l, no LM head, adapter merged, prefix computed once.

Shape suffixes: B windows, T tokens, P tokens of the constant prefix, D width.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.utils.import_utils import is_flash_attn_2_available

from reft_ray.core.batch import token_batches
from reft_ray.core.conversation import chat
from reft_ray.core.refusal import prompt_feature, refusal_score
from reft_ray.core.scoring import TextScore
from reft_ray.core.verdict import Calibration, Thresholds, reach
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import TruncatedModel, decoder_layers
from reft_ray.hf.loading import text_config
from reft_ray.hf.parallel_passes import ParallelPasses, parallel_passes_if_faster
from reft_ray.hf.windows import Windows

_SHORT = "What is a good way to say this in about as many words as most people use for a question?"
_SHARES = 4
"""Batches that run side by side are smaller, so that none is waited for long; too small ones compute slowly."""


@dataclass(frozen=True, slots=True)
class _Window:
    text: int
    ids: list[int]


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows of one forward pass, without the cached prefix if `use_cache`; `padded` counts tokens with padding."""

    indices: list[int]
    rows: list[list[int]]
    padded: int
    use_cache: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


class TeacherScorer:
    """`core.scoring.Scorer` over a model whose teacher adapter is already merged; the model is cut to `layer` layers.

    Texts longer than `window_tokens` are scored in windows that overlap by a quarter; the highest score wins.
    `max_windows` bounds the work on one text; what lies behind is reported as truncated.

    Batches are padded, their prefix comes from a cache. `packed` ones are one row of texts end to end without padding:
    faster where attention knows the ends of sequences (FlashAttention), slower anywhere else.
    With `lanes` several batches run at a time, each of a part of `batch_tokens`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat_format: ChatFormat,
        refusal_D: Tensor,
        layer: int,
        teacher_id: str,
        thresholds: Thresholds,
        calibration: Calibration,
        response_offset: float = 0.0,
        window_tokens: int = 512,
        batch_tokens: int = 4096,
        max_windows: int = 512,
        packed: bool = False,
    ) -> None:
        self.model = cut_to_layer(model, layer).eval().requires_grad_(False)
        self.hidden = TruncatedModel(self.model, layer)
        self.chat = chat_format
        self.layer = layer
        self.refusal_D = refusal_D.to(model.device)
        self.teacher_id = teacher_id
        self.thresholds = thresholds
        self.calibration = calibration
        self.response_offset = response_offset
        self.window_tokens = min(window_tokens, int(text_config(model).max_position_embeddings or window_tokens))
        self.batch_tokens = batch_tokens
        self.tokens_run = 0
        self.tokens_padded = 0
        self.tokenise_seconds = 0.0
        self._windows = Windows.of(chat_format, self.window_tokens, max_windows)
        self._prefix = list(self._windows.head)
        self.packed = packed
        self.lanes: ParallelPasses | None = None
        self._cache_P = self._run_prefix() if self._prefix and not packed else None

    def spread(self) -> None:
        """Run batches side by side from now on where that pays here: measured with a short prompt."""
        (batch,) = self._padded_batches(self.prompt_ids([_SHORT]))
        self.lanes = parallel_passes_if_faster(partial(self._forward, batch))

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """One TextScore per text, in order; equal to a plain forward whatever else is in the call."""
        windows: list[_Window] = []
        truncated = [False] * len(texts)
        for index, ids in enumerate(self.prompt_ids(texts)):
            pieces, truncated[index] = self._windows.split(ids)
            windows += [_Window(index, piece) for piece in pieces]
        best = [-1.0] * len(texts)
        count = [0] * len(texts)
        for window, value in zip(windows, self.score_tokens([w.ids for w in windows]), strict=True):
            best[window.text] = max(best[window.text], value, key=reach)
            count[window.text] += 1
        return [TextScore(*item) for item in zip(best, count, truncated, strict=True)]

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text as a templated user prompt."""
        started = time.perf_counter()
        rendered = [self.chat.render(chat(text), generation=True) for text in texts]
        ids = list(self.chat.tokenizer(rendered, add_special_tokens=False)["input_ids"]) if rendered else []
        self.tokenise_seconds += time.perf_counter() - started
        return ids

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Templated prompt tokens per text, for whoever builds batches by budget."""
        return [len(ids) for ids in self.prompt_ids(texts)]

    def score_tokens(self, rows: list[list[int]]) -> list[float]:
        """The refusal score of each templated prompt, given as tokens that fit one window."""
        batches = list(self._packed_batches(rows) if self.packed else self._padded_batches(rows))
        self.tokens_run += sum(batch.tokens for batch in batches)
        self.tokens_padded += sum(batch.padded for batch in batches)
        found = self.lanes.map(self._forward, batches) if self.lanes else map(self._forward, batches)
        scores = [0.0] * len(rows)
        for batch, values in zip(batches, found, strict=True):
            for index, value in zip(batch.indices, values.tolist(), strict=True):
                scores[index] = value
        return scores

    def _packed_batches(self, rows: list[list[int]]) -> Iterator[_Batch]:
        for indices in token_batches([len(row) for row in rows], self.batch_tokens):
            picked = [rows[index] for index in indices]
            yield _Batch(indices, picked, sum(map(len, picked)), False)

    def _padded_batches(self, rows: list[list[int]]) -> Iterator[_Batch]:
        budget = self.batch_tokens // (min(self.lanes.count, _SHARES) if self.lanes else 1)
        cached = [self._cache_P is not None and row[: len(self._prefix)] == self._prefix for row in rows]
        for use_cache in (True, False):
            chosen = [i for i in range(len(rows)) if cached[i] == use_cache]
            skip = len(self._prefix) if use_cache else 0
            lengths = [len(rows[i]) - skip for i in chosen]
            for indices in token_batches(lengths, budget, max_padding=0.1):
                picked = [rows[chosen[i]][skip:] for i in indices]
                width = max(map(len, picked))
                yield _Batch([chosen[i] for i in indices], picked, width * len(picked), use_cache)

    @torch.inference_mode()
    def _forward(self, batch: _Batch) -> Tensor:
        """Scores [B] of a batch; may run in several threads at once."""
        return self._forward_packed(batch.rows) if self.packed else self._forward_padded(batch.rows, batch.use_cache)

    def _forward_padded(self, rows: list[list[int]], use_cache: bool) -> Tensor:
        width = max(map(len, rows))
        past = len(self._prefix) if use_cache else 0
        device = self.refusal_D.device
        ids_BT = torch.tensor([row + [self.chat.pad_id] * (width - len(row)) for row in rows], device=device)
        end_B = torch.tensor([len(row) - 1 for row in rows], device=device)
        uniform = all(len(row) == width for row in rows)
        mask_BT = None
        if not uniform:
            mask_BT = (torch.arange(past + width, device=device)[None, :] <= (end_B + past)[:, None]).long()
        cache = self._expanded_cache(len(rows)) if use_cache else None
        hidden_BTD = self.hidden(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=use_cache)
        return refusal_score(prompt_feature(hidden_BTD, end_B), self.refusal_D)

    def _forward_packed(self, rows: list[list[int]]) -> Tensor:
        """Scores of whole prompts run as one sequence; positions that start anew tell attention where each begins."""
        device = self.refusal_D.device
        ids_1T = torch.tensor([[token for row in rows for token in row]], device=device)
        place_1T = torch.cat([torch.arange(len(row)) for row in rows])[None].to(device)
        end_B = torch.tensor([len(row) for row in rows]).cumsum(0).to(device) - 1
        hidden_1TD = self.hidden(input_ids=ids_1T, position_ids=place_1T, use_cache=False)
        return refusal_score(hidden_1TD[0, end_B], self.refusal_D)

    @torch.inference_mode()
    def _run_prefix(self) -> list[tuple[Tensor, Tensor]]:
        ids_BT = torch.tensor([self._prefix], device=self.refusal_D.device)
        cache = DynamicCache(config=self.model.config)
        self.hidden(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        return [(layer.keys, layer.values) for layer in cache.layers[: self.layer]]  # type: ignore[union-attr,misc]

    def _expanded_cache(self, rows: int) -> DynamicCache:
        assert self._cache_P is not None
        cache = DynamicCache(config=self.model.config)
        for index, (keys, values) in enumerate(self._cache_P):
            cache.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
        return cache

    @property
    def padding_share(self) -> float:
        """Share of all computed tokens that were padding."""
        return 1.0 - self.tokens_run / self.tokens_padded if self.tokens_padded else 0.0


def packs(device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether attention without padding is to be had here: FlashAttention, on a GPU, in half precision."""
    half = dtype in (torch.bfloat16, torch.float16)
    return half and torch.device(device).type == "cuda" and is_flash_attn_2_available()


def cut_to_layer(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Free the layers above `layer` and the LM head: a verdict never runs them. The model is changed in place."""
    layers = decoder_layers(model)
    del layers[layer:]
    text_config(model).num_hidden_layers = layer
    types = getattr(text_config(model), "layer_types", None)
    if types is not None:
        text_config(model).layer_types = types[:layer]
    return model.base_model  # type: ignore[return-value]
