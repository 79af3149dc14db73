"""Tokenised rows and the tensors made of them: padded, or packed end to end.

Shape suffixes: B rows, BT positions, D width, N labelled positions of a batch. The positions of a padded batch are
B rows of T tokens; a packed batch has all its rows in one line, so that they are 1 x T.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, takewhile

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reft_ray.core.conversation import Label

IGNORE_INDEX = -100
UNLABELLED = -1
_CPU_LINE = 512
"""Tokens of a packed line on a CPU: attention takes the square of it, and a longer line saves little."""

Tokens = Sequence[int] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """One tokenised row.

    `loss_mask[t]` is True where token t is learned (the tokens of answers). The answer begins after
    `last_prompt_index`, the last token of the templated prompt. `index` is the row's place in its dataset.
    """

    ids: list[int]
    loss_mask: list[bool]
    last_prompt_index: int
    label: Label | None = None
    index: int = 0

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def trained_tokens(self) -> int:
        """How many tokens of this row are labels; the first token of a row never is."""
        return sum(self.loss_mask[1:])

    def prompt_only(self) -> TokenizedExample:
        """The templated prompt without its answer."""
        end = self.last_prompt_index + 1
        return replace(self, ids=self.ids[:end], loss_mask=[False] * end)


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the rows of a packed line are: row b has the tokens `ends[b]` to `ends[b + 1]`.

    `position_1T` restarts at each row; `ends` is int32 on the batch's device, as attention kernels read it; `longest`
    is the most tokens of a row. A line whose rows share their first tokens begins with these, and `mask_TT` says which
    tokens each token sees.
    """

    position_1T: Tensor
    ends: Tensor
    longest: int
    mask_TT: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows as tensors; `labels_BT[b, t]` is the token to predict *at* position t, or IGNORE_INDEX.

    `where_N` are the labelled positions among all positions, in order: with it nothing has to wait for the device to
    count them. `row_N` is the row of each. `line_B` and `last_prompt_index_B` say where a row's prompt ends. `index_B`
    stays on the CPU, where soft labels are looked up.
    """

    ids_BT: Tensor
    attention_mask_BT: Tensor
    labels_BT: Tensor
    where_N: Tensor
    row_N: Tensor
    line_B: Tensor
    last_prompt_index_B: Tensor
    label_B: Tensor = field(repr=False)
    index_B: Tensor = field(repr=False)
    packing: Packing | None = None

    @property
    def labelled(self) -> int:
        """The number of positions with a label."""
        return len(self.where_N)

    @property
    def loss_mask_BT(self) -> Tensor:
        """Positions whose next token is learned."""
        return self.labels_BT != IGNORE_INDEX

    @property
    def labels_N(self) -> Tensor:
        """The learned tokens, row by row: the order of `logits_NV`."""
        return self.labels_BT.flatten()[self.where_N]

    def learned(self, hidden_BTD: Tensor) -> Tensor:
        """The labelled positions of a tensor over all positions, [N, D]."""
        return hidden_BTD.flatten(0, 1)[self.where_N]

    def prompt_ends(self, hidden_BTD: Tensor) -> Tensor:
        """The last prompt token of every row, [B, D]."""
        return hidden_BTD[self.line_B, self.last_prompt_index_B]

    @property
    def harmful_B(self) -> Tensor:
        """Rows labelled harmful."""
        return self.label_B == 1

    @property
    def harmless_B(self) -> Tensor:
        """Rows labelled harmless."""
        return self.label_B == 0

    def __len__(self) -> int:
        return len(self.label_B)


def collate(rows: Sequence[TokenizedExample], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pad rows to the longest of them."""
    length = max(len(row) for row in rows)
    return _batch(rows, list(range(0, len(rows) * length, length)), (len(rows), length), pad_id, device)


def pack(rows: Sequence[TokenizedExample], device: torch.device | str = "cpu", prefix: int | None = None) -> Batch:
    """Rows end to end in one line, without padding; only a model that knows where they end may read it.

    With a `prefix` the line begins with as many tokens, with which all rows begin, so that a pass computes these once;
    its mask takes the square of the line's length.
    """
    shared = prefix or 0
    own = [len(row) - shared for row in rows]
    ends = list(accumulate(own, initial=shared))
    positions = torch.cat([torch.arange(shared), *(torch.arange(shared, len(row)) for row in rows)])[None]
    mask_TT = None
    if prefix is not None:
        row_T = torch.arange(len(ends)).repeat_interleave(torch.tensor([shared, *own]))
        mask_TT = ((row_T[:, None] == row_T) | (row_T == 0)).tril().to(device)
    bounds = torch.tensor(ends, dtype=torch.int32).to(device)
    packing = Packing(positions.to(device), bounds, max(map(len, rows)), mask_TT)
    starts = [end - shared for end in ends[:-1]]
    return replace(_batch(rows, starts, (1, ends[-1]), 0, device, shared), packing=packing)


def _common_prefix(rows: Sequence[TokenizedExample]) -> int:
    """How many tokens all rows begin with, none of them a label or the last of a prompt."""
    prompts = (row.ids[: _unlabelled(row)] for row in rows)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*prompts, strict=False)))


def _unlabelled(row: TokenizedExample) -> int:
    """The tokens before the first position that predicts a label, within the prompt."""
    first = row.loss_mask.index(True, 1) - 1 if row.trained_tokens else row.last_prompt_index
    return min(first, row.last_prompt_index)


def _batch(
    rows: Sequence[TokenizedExample],
    starts: list[int],
    shape: tuple[int, int],
    pad_id: int,
    device: torch.device | str,
    prefix: int = 0,
) -> Batch:
    """Rows from their `starts` among all positions of a batch of `shape`; only the first has its `prefix` tokens."""
    ids = torch.full(shape, pad_id, dtype=torch.long).flatten()
    mask = torch.zeros_like(ids)
    labels = torch.full_like(ids, IGNORE_INDEX)
    where: list[Tensor] = []
    for start, row in zip(starts, rows, strict=True):
        tokens = torch.tensor(row.ids, dtype=torch.long)
        shared = prefix if start else 0
        inside = slice(start + shared, start + len(row))
        ids[inside], mask[inside] = tokens[shared:], 1
        learned = torch.tensor(row.loss_mask[1:], dtype=torch.bool).nonzero()[:, 0]
        labels[start + learned] = tokens[1 + learned]
        where.append(start + learned)
    codes = {None: UNLABELLED, Label.HARMLESS: 0, Label.HARMFUL: 1}
    first = torch.tensor(starts)
    width = shape[1]
    prompt_end = first + torch.tensor([row.last_prompt_index for row in rows])
    counts = torch.tensor([len(part) for part in where])
    on_device = {
        "ids_BT": ids.view(shape),
        "attention_mask_BT": mask.view(shape),
        "labels_BT": labels.view(shape),
        "where_N": torch.cat(where),
        "row_N": torch.arange(len(rows)).repeat_interleave(counts),
        "line_B": prompt_end // width,
        "last_prompt_index_B": prompt_end % width,
        "label_B": torch.tensor([codes[row.label] for row in rows]),
    }
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in on_device.items()}
    return Batch(**moved, index_B=torch.tensor([row.index for row in rows]), packing=None)


def collate_targets(rows: Sequence[tuple[Tokens, Tokens]], pad_id: int, device: torch.device | str) -> Batch:
    """Rows of (tokens, targets), padded, with a label at every token: it need not be the token that follows."""
    width = max(len(tokens) for tokens, _ in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, pad_id, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORE_INDEX)
    for line, (tokens, targets) in enumerate(rows):
        inside = slice(0, len(tokens))
        ids[line, inside] = torch.as_tensor(tokens, dtype=torch.long)
        labels[line, inside] = torch.as_tensor(targets, dtype=torch.long)
        mask[line, inside] = 1
    where_N = mask.flatten().nonzero()[:, 0]
    lines = torch.arange(len(rows))
    made = {
        "ids_BT": ids,
        "attention_mask_BT": mask,
        "labels_BT": labels,
        "where_N": where_N,
        "row_N": where_N // width,
        "line_B": lines,
        "last_prompt_index_B": torch.zeros_like(lines),
        "label_B": torch.full_like(lines, UNLABELLED),
    }
    return Batch(**{name: tensor.to(device) for name, tensor in made.items()}, index_B=lines, packing=None)


def dummy_batch(pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """A padding batch without a label: a rank without rows takes part in a step with it and adds zeros."""
    return collate([TokenizedExample([pad_id], [False], 0)], pad_id, device)


def token_batches(lengths: Sequence[int], max_tokens: int, max_padding: float = 1.0) -> Iterator[list[int]]:
    """Group row indices into batches of at most `max_tokens` padded tokens, rows of like length together.

    A batch is closed early where padding would exceed the share `max_padding` of it. A row longer than the budget
    is a batch by itself.
    """
    batch: list[int] = []
    tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        # The first row of a batch is its longest, so it alone sets the padded width.
        padded = (len(batch) + 1) * lengths[batch[0]] if batch else 0
        if batch and (padded > max_tokens or padded - tokens - lengths[index] > max_padding * padded):
            yield batch
            batch, tokens = [], 0
        batch.append(index)
        tokens += lengths[index]
    if batch:
        yield batch


def packed_lines(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group row indices into lines of at most `max_tokens`, the longest rows first, each where the least room is left.

    A row longer than the budget is a line by itself.
    """
    lines: list[list[int]] = []
    room: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        # `room` is sorted, so that the first line with enough of it fits best.
        at = bisect_left(room, (lengths[index], -1))
        left, line = room.pop(at) if at < len(room) else (max_tokens, len(lines))
        if line == len(lines):
            lines.append([])
        lines[line].append(index)
        insort(room, (left - lengths[index], line))
    return lines


def micro_batches(
    rows: Sequence[TokenizedExample], max_tokens: int, pad_id: int, device: torch.device | str, packed: bool = False
) -> list[Batch]:
    """Rows -> batches under a token budget, padded or packed."""
    return [batch for _, batch in indexed_batches(rows, max_tokens, pad_id, device, packed)]


def indexed_batches(
    rows: Sequence[TokenizedExample], max_tokens: int, pad_id: int, device: torch.device | str, packed: bool = False
) -> Iterator[tuple[list[int], Batch]]:
    """The batches of `micro_batches`, each after the places of its rows."""
    lengths = [len(row) for row in rows]
    if not packed:
        for indices in token_batches(lengths, max_tokens):
            yield indices, collate([rows[i] for i in indices], pad_id, device)
    elif torch.device(device).type == "cuda":
        for indices in packed_lines(lengths, max_tokens):
            yield indices, pack([rows[i] for i in indices], device)
    elif rows:
        prefix = _common_prefix(rows)
        room = max(1, min(max_tokens, _CPU_LINE) - prefix)
        for indices in packed_lines([length - prefix for length in lengths], room):
            yield indices, pack([rows[i] for i in indices], device, prefix)


def answered(rows: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """The rows that have tokens to learn."""
    return [row for row in rows if row.trained_tokens]


def numbered(rows: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """The same rows, indexed by their place in this list."""
    return [replace(row, index=index) for index, row in enumerate(rows)]
