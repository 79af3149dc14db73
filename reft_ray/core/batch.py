"""Tokenised rows and the padded tensors made of them.

Shape suffixes: B rows, T tokens, N labelled positions of a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from reft_ray.core.conversation import Label

IGNORE_INDEX = -100
UNLABELLED = -1


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
class Batch:
    """Right-padded rows; `labels_BT[b, t]` is the token to predict *at* position t, or IGNORE_INDEX.

    `labelled` is the number of positions with a label; on the CPU, so that reading it waits for no device.
    """

    ids_BT: Tensor
    attention_mask_BT: Tensor
    labels_BT: Tensor
    last_prompt_index_B: Tensor
    label_B: Tensor = field(repr=False)
    index_B: Tensor = field(repr=False)
    labelled: int

    @property
    def loss_mask_BT(self) -> Tensor:
        """Positions whose next token is learned."""
        return self.labels_BT != IGNORE_INDEX

    @property
    def labels_N(self) -> Tensor:
        """The learned tokens, row by row: the order of `logits_NV`."""
        return self.labels_BT[self.loss_mask_BT]

    @property
    def harmful_B(self) -> Tensor:
        """Rows labelled harmful."""
        return self.label_B == 1

    @property
    def harmless_B(self) -> Tensor:
        """Rows labelled harmless."""
        return self.label_B == 0

    def __len__(self) -> int:
        return self.ids_BT.shape[0]


def collate(rows: Sequence[TokenizedExample], pad_id: int, device: torch.device | str = "cpu") -> Batch:
    """Pad rows to the longest of them."""
    length = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), length), pad_id, dtype=torch.long)
    attention_mask_BT = torch.zeros((len(rows), length), dtype=torch.long)
    labels_BT = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.long)
    for b, row in enumerate(rows):
        tokens = torch.tensor(row.ids, dtype=torch.long)
        ids_BT[b, : len(row)] = tokens
        attention_mask_BT[b, : len(row)] = 1
        learned = torch.tensor(row.loss_mask[1:], dtype=torch.bool)
        labels_BT[b, : len(row) - 1][learned] = tokens[1:][learned]
    codes = {None: UNLABELLED, Label.HARMLESS: 0, Label.HARMFUL: 1}
    return Batch(
        ids_BT.to(device),
        attention_mask_BT.to(device),
        labels_BT.to(device),
        torch.tensor([row.last_prompt_index for row in rows], device=device),
        torch.tensor([codes[row.label] for row in rows], device=device),
        torch.tensor([row.index for row in rows], device=device),
        sum(row.trained_tokens for row in rows),
    )


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


def micro_batches(
    rows: Sequence[TokenizedExample], max_tokens: int, pad_id: int, device: torch.device | str
) -> list[Batch]:
    """Rows -> padded batches under a token budget."""
    return [
        collate([rows[i] for i in indices], pad_id, device)
        for indices in token_batches([len(row) for row in rows], max_tokens)
    ]


def answered(rows: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """The rows that have tokens to learn."""
    return [row for row in rows if row.trained_tokens]


def numbered(rows: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """The same rows, indexed by their place in this list."""
    return [replace(row, index=index) for index, row in enumerate(rows)]
