"""A white-box search for a suffix that lowers the refusal score, greedy with gradients.

Greedy coordinate gradient (Zou et al., arXiv 2307.15043) with s(x) as its loss: the gradient with respect to the
one-hot suffix proposes tokens, exact scores choose among the proposals.

Shape suffixes: S suffix tokens, V vocabulary, D width, B candidates, T tokens.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from reft_ray.core.conversation import chat
from reft_ray.hf.scorer import TeacherScorer


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """`width` candidates per step; each changes one token to one of the `proposals` best for its position."""

    tokens: int = 12
    steps: int = 30
    width: int = 64
    proposals: int = 64


@dataclass(frozen=True, slots=True)
class Found:
    """A suffix as text, and the mean refusal score of the prompts without and with it."""

    suffix: str
    before: float
    after: float


class TokenSearch:
    """Searches suffixes for one teacher. Only plain words are used, so that their text has the same tokens again."""

    def __init__(self, scorer: TeacherScorer, settings: SearchSettings | None = None, seed: int = 0) -> None:
        self.scorer = scorer
        self.settings = settings or SearchSettings()
        self.rng = random.Random(seed)  # noqa: S311
        self.embedding = scorer.model.get_input_embeddings()
        self.allowed_V = self._plain_words()

    def fits(self, prompt: str) -> bool:
        """Whether a prompt and its suffix are scored in one window."""
        head, tail = self._frame(prompt)
        return len(head) + self.settings.tokens + len(tail) <= self.scorer.window_tokens

    def suffix(self, prompts: Sequence[str]) -> Found:
        """One suffix that lowers the mean score of all prompts. Raises ValueError unless all fit."""
        if not all(map(self.fits, prompts)):
            raise ValueError("every prompt must fit one window together with its suffix")
        frames = [self._frame(prompt) for prompt in prompts]
        before = _mean(self.scorer.score_tokens([head + tail for head, tail in frames]))
        tokens = self._start()
        after = self._scores(frames, [tokens])[0]
        for _ in range(self.settings.steps):
            candidates = self._candidates(frames, tokens)
            if not candidates:
                break
            scores = self._scores(frames, candidates)
            best = min(range(len(scores)), key=scores.__getitem__)
            if scores[best] < after:
                tokens, after = candidates[best], scores[best]
        return Found(self._text(tokens), before, after)

    def _frame(self, prompt: str) -> tuple[list[int], list[int]]:
        """Tokens before and after the suffix."""
        fmt = self.scorer.chat
        text = fmt.render(chat(prompt), generation=True)
        cut = text.rindex(prompt) + len(prompt)
        return fmt.tokens(text[:cut]), fmt.tokens(text[cut:])

    def _plain_words(self) -> Tensor:
        """Which tokens are a blank followed by letters, [V] bool."""
        tokenizer = self.scorer.chat.tokenizer
        pieces = [str(tokenizer.decode([index])) for index in range(self.embedding.weight.shape[0])]
        plain = [piece[:1] == " " and piece[1:].isascii() and piece[1:].isalpha() for piece in pieces]
        return torch.tensor(plain, device=self.embedding.weight.device)

    def _start(self) -> list[int]:
        words = torch.nonzero(self.allowed_V).flatten().tolist()
        while True:
            tokens = [self.rng.choice(words) for _ in range(self.settings.tokens)]
            if self._round_trips(tokens):
                return tokens

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.scorer.chat.tokenizer.decode(list(tokens)))

    def _round_trips(self, tokens: Sequence[int]) -> bool:
        """Whether the text of these tokens has the same tokens again."""
        return self.scorer.chat.tokens(self._text(tokens)) == list(tokens)

    def _candidates(self, frames: Sequence[tuple[list[int], list[int]]], tokens: list[int]) -> list[list[int]]:
        slope_SV = self._gradient(frames, tokens)
        slope_SV[:, ~self.allowed_V] = torch.inf
        best_SK = slope_SV.topk(self.settings.proposals, largest=False).indices.tolist()
        seen: dict[tuple[int, ...], None] = {}
        for _ in range(self.settings.width):
            position = self.rng.randrange(len(tokens))
            changed = [*tokens]
            changed[position] = self.rng.choice(best_SK[position])
            if changed != tokens and self._round_trips(changed):
                seen.setdefault(tuple(changed))
        return [list(changed) for changed in seen]

    def _gradient(self, frames: Sequence[tuple[list[int], list[int]]], tokens: list[int]) -> Tensor:
        """d(sum of scores) / d(one-hot suffix), [S, V]."""
        scorer, weight_VD = self.scorer, self.embedding.weight
        suffix_SD = weight_VD[tokens].detach().clone().requires_grad_(True)
        gradient_SD = torch.zeros_like(suffix_SD)
        for head, tail in frames:
            head_TD, tail_TD = (weight_VD[part].detach() for part in (head, tail))
            embedded_BTD = torch.cat([head_TD, suffix_SD, tail_TD]).unsqueeze(0)
            hidden = scorer.hidden(inputs_embeds=embedded_BTD, use_cache=False)
            score = scorer.readouts.score({layer: x_BTD[:, -1] for layer, x_BTD in hidden.items()}).sum()
            gradient_SD += torch.autograd.grad(score, suffix_SD)[0]
        return gradient_SD @ weight_VD.detach().T

    def _scores(self, frames: Sequence[tuple[list[int], list[int]]], candidates: Sequence[list[int]]) -> list[float]:
        rows = [head + tokens + tail for tokens in candidates for head, tail in frames]
        scores = self.scorer.score_tokens(rows)
        size = len(frames)
        return [_mean(scores[at : at + size]) for at in range(0, len(scores), size)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
