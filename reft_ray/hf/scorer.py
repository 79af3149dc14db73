"""Refusal scores at minimal cost: layers 1..l, no LM head, adapter merged, constant prefix cached.

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

from reft_ray.core.batch import TokenizedExample, pack, token_batches
from reft_ray.core.conversation import chat
from reft_ray.core.geometry import Readouts
from reft_ray.core.refusal import prompt_feature
from reft_ray.core.scoring import TextScore
from reft_ray.core.verdict import Calibration, Thresholds, finite
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.compute import ParallelPasses, parallel_passes_if_faster
from reft_ray.hf.forward import TruncatedModel, decoder_layers
from reft_ray.hf.loading import text_config
from reft_ray.hf.packing import enable_packing, packed_inputs
from reft_ray.hf.windows import Windows

_SHORT = "What is a good way to say this in about as many words as most people use for a question?"
_OF_SEVERAL = 0.5
"""The highest of many windows is higher by chance, and most of them ask for nothing, as answers do: a text in several
windows scores lower by this share of the offset of answers (measured in docs/results-smollm2.md)."""
_WITH_KEYS = {"full_attention", "sliding_attention", "chunked_attention"}
_MAX_SPLIT = 4
"""Parallel batches are smaller, so that the last one does not take long; batches that are too small are inefficient."""


@dataclass(frozen=True, slots=True)
class _Batch:
    """Rows of one forward pass, without the cached prefix if `use_cache`; `padded` counts tokens including padding."""

    indices: list[int]
    rows: list[list[int]]
    padded: int
    use_cache: bool

    @property
    def tokens(self) -> int:
        return sum(map(len, self.rows))


class TeacherScorer:
    """`core.scoring.Scorer` over a model whose teacher adapter is already merged; the model is cut to the highest
    layer that is read.

    Texts longer than `window_tokens` are scored in windows that overlap by a quarter; the highest score wins.
    `max_windows` bounds the work on one text; the rest of it is reported as truncated.

    Batches are padded, and their prefix comes from a cache. `packed` batches are one line of texts end to end without
    padding, if the model then computes the same (`packing.enable_packing`): faster where `packing.is_fast`.
    With `parallel` several batches run at a time, each with a part of `batch_tokens`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat_format: ChatFormat,
        readouts: Readouts,
        teacher_id: str,
        thresholds: Thresholds,
        calibration: Calibration,
        response_offset: float = 0.0,
        window_tokens: int = 512,
        batch_tokens: int = 4096,
        max_windows: int = 512,
        packed: bool = False,
    ) -> None:
        self.layer = max(readouts.layers)
        self.packed = packed and enable_packing(model)
        self.model = cut_to_layer(model, self.layer).eval().requires_grad_(False)
        self.hidden = TruncatedModel(self.model, readouts.layers)
        self.chat = chat_format
        self.readouts = readouts.to(model.device)
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
        self.parallel: ParallelPasses | None = None
        self._prefix_states = [] if self.packed else self._run_prefix()

    def enable_parallel_passes(self) -> None:
        """Run batches in parallel if that is faster on this machine, measured with a short prompt."""
        (batch,) = self._padded_batches(self.prompt_ids([_SHORT]))
        self.parallel = parallel_passes_if_faster(partial(self._forward, batch))

    def score(self, texts: Sequence[str]) -> list[TextScore]:
        """One TextScore per text, in order; equal to a plain forward pass whatever else is in the call."""
        prompts = self.prompt_ids(texts)
        windows: list[list[int]] = []
        owned: list[range] = []
        truncated = [False] * len(texts)
        for index, ids in enumerate(prompts):
            pieces, truncated[index] = self._windows.split(ids)
            owned.append(range(len(windows), len(windows) + len(pieces)))
            windows += pieces
        scores = [finite(value) for value in self.score_tokens(windows)]
        found = []
        for ids, own, cut in zip(prompts, owned, truncated, strict=True):
            best = max(own, key=scores.__getitem__)
            score, span = scores[best], None
            if len(own) > 1:
                score -= self.response_offset * _OF_SEVERAL
                span = self._span(ids, best - own.start)
            found.append(TextScore(max(-1.0, score), len(own), cut, span))
        return found

    def _span(self, ids: list[int], window: int) -> tuple[int, int]:
        """The characters of a window within its text."""
        decode = self.chat.tokenizer.decode
        before, within = self._windows.place(ids, window)
        start = len(decode(before))
        return start, start + len(decode(within))

    def prompt_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of each text as a templated user prompt."""
        started = time.perf_counter()
        rendered = [self.chat.render(chat(text), generation=True) for text in texts]
        ids = self.chat.control.tokenize(rendered)
        self.tokenise_seconds += time.perf_counter() - started
        return ids

    def score_tokens(self, rows: list[list[int]]) -> list[float]:
        """The refusal score of each templated prompt, given as tokens that fit one window."""
        batches = list(self._packed_batches(rows) if self.packed else self._padded_batches(rows))
        self.tokens_run += sum(batch.tokens for batch in batches)
        self.tokens_padded += sum(batch.padded for batch in batches)
        found = self.parallel.map(self._forward, batches) if self.parallel else map(self._forward, batches)
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
        budget = self.batch_tokens // (min(self.parallel.count, _MAX_SPLIT) if self.parallel else 1)
        cached = [bool(self._prefix_states) and row[: len(self._prefix)] == self._prefix for row in rows]
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
        device = self.model.device
        ids_BT = torch.tensor([row + [self.chat.pad_id] * (width - len(row)) for row in rows], device=device)
        end_B = torch.tensor([len(row) - 1 for row in rows], device=device)
        uniform = all(len(row) == width for row in rows)
        mask_BT = None
        if not uniform:
            mask_BT = (torch.arange(past + width, device=device)[None, :] <= (end_B + past)[:, None]).long()
        cache = self._expanded_cache(len(rows)) if use_cache else None
        hidden = self.hidden(input_ids=ids_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=use_cache)
        return self.readouts.score({layer: prompt_feature(x_BTD, end_B) for layer, x_BTD in hidden.items()})

    def _forward_packed(self, rows: list[list[int]]) -> Tensor:
        """Scores of whole prompts run as one line."""
        line = pack([TokenizedExample(row, [False] * len(row), len(row) - 1) for row in rows], self.model.device)
        hidden = self.hidden(input_ids=line.ids_BT, use_cache=False, **packed_inputs(line))
        return self.readouts.score({layer: x_1TD[0, line.last_prompt_index_B] for layer, x_1TD in hidden.items()})

    @torch.inference_mode()
    def _run_prefix(self) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the constant prefix per layer; none if a layer keeps a part of them, or another state."""
        layers = set(getattr(text_config(self.model), "layer_types", None) or ())
        if not self._prefix or layers - _WITH_KEYS:
            return []
        ids_BT = torch.tensor([self._prefix], device=self.model.device)
        cache = DynamicCache(config=self.model.config)
        self.hidden(input_ids=ids_BT, past_key_values=cache, use_cache=True)
        states = [(getattr(of, "keys", None), getattr(of, "values", None)) for of in cache.layers[: self.layer]]
        kept = [(keys, values) for keys, values in states if keys is not None and values is not None]
        whole = len(kept) == len(states) and all(keys.shape[-2] == len(self._prefix) for keys, _ in kept)
        return kept if whole else []

    def _expanded_cache(self, rows: int) -> DynamicCache:
        states = (tuple(states.expand(rows, -1, -1, -1) for states in layer) for layer in self._prefix_states)
        return DynamicCache(states, config=self.model.config)

    @property
    def padding_share(self) -> float:
        """Share of all computed tokens that were padding."""
        return 1.0 - self.tokens_run / self.tokens_padded if self.tokens_padded else 0.0


def cut_to_layer(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Free the layers above `layer` and the LM head, in place: scoring never runs them."""
    layers = decoder_layers(model)
    del layers[layer:]
    text_config(model).num_hidden_layers = layer
    types = getattr(text_config(model), "layer_types", None)
    if types is not None:
        text_config(model).layer_types = types[:layer]
    return model.base_model  # type: ignore[return-value]
