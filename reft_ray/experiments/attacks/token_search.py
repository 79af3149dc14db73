"""A suffix that lowers the refusal score, searched greedily with gradients by one who holds the teacher.

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
from reft_ray.core.refusal import refusal_score
from reft_ray.hf.scorer import TeacherScorer


@dataclass(frozen=True, slots=True)
class SearchSettings:
    """`width` candidates a step, each with one token changed to one of the `proposals` best of its place."""

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
    """Searches suffixes against one teacher. Only plain words are used, so that the text is tokenised as searched."""

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
        """One suffix for all of the prompts: their mean score is lowered. Raises ValueError unless all fit."""
        if not all(map(self.fits, prompts)):
            raise ValueError("a suffix is searched for prompts that fit one window with it")
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
        """Tokens before and behind the suffix."""
        fmt = self.scorer.chat
        text = fmt.render(chat(prompt), generation=True)
        cut = text.rindex(prompt) + len(prompt)
        return fmt.tokens(text[:cut]), fmt.tokens(text[cut:])

    def _plain_words(self) -> Tensor:
        """Which tokens stand for a blank and lower-case letters, [V] bool."""
        tokenizer = self.scorer.chat.tokenizer
        pieces = [str(tokenizer.decode([index])) for index in range(self.embedding.weight.shape[0])]
        plain = [piece[:1] == " " and piece[1:].isascii() and piece[1:].isalpha() for piece in pieces]
        return torch.tensor(plain, device=self.embedding.weight.device)

    def _start(self) -> list[int]:
        words = torch.nonzero(self.allowed_V).flatten().tolist()
        while True:
            tokens = [self.rng.choice(words) for _ in range(self.settings.tokens)]
            if self._kept(tokens):
                return tokens

    def _text(self, tokens: Sequence[int]) -> str:
        return str(self.scorer.chat.tokenizer.decode(list(tokens)))

    def _kept(self, tokens: Sequence[int]) -> bool:
        """Whether the text of these tokens is tokenised to them again."""
        return self.scorer.chat.tokens(self._text(tokens)) == list(tokens)

    def _candidates(self, frames: Sequence[tuple[list[int], list[int]]], tokens: list[int]) -> list[list[int]]:
        slope_SV = self._gradient(frames, tokens)
        slope_SV[:, ~self.allowed_V] = torch.inf
        best_SK = slope_SV.topk(self.settings.proposals, largest=False).indices.tolist()
        seen: dict[tuple[int, ...], None] = {}
        for _ in range(self.settings.width):
            place = self.rng.randrange(len(tokens))
            changed = [*tokens]
            changed[place] = self.rng.choice(best_SK[place])
            if changed != tokens and self._kept(changed):
                seen.setdefault(tuple(changed))
        return [list(changed) for changed in seen]

    def _gradient(self, frames: Sequence[tuple[list[int], list[int]]], tokens: list[int]) -> Tensor:
        """d(sum of scores) / d(one-hot suffix), [S, V]."""
        scorer, weight_VD = self.scorer, self.embedding.weight
        suffix_SD = weight_VD[tokens].detach().clone().requires_grad_(True)
        for head, tail in frames:
            around = [weight_VD[part].detach() for part in (head, tail)]
            embedded_BTD = torch.cat([around[0], suffix_SD, around[1]]).unsqueeze(0)
            hidden_BTD = scorer.hidden(inputs_embeds=embedded_BTD, use_cache=False)
            refusal_score(hidden_BTD[:, -1], scorer.refusal_D).sum().backward()
        assert suffix_SD.grad is not None
        return suffix_SD.grad @ weight_VD.detach().T

    def _scores(self, frames: Sequence[tuple[list[int], list[int]]], candidates: Sequence[list[int]]) -> list[float]:
        rows = [head + tokens + tail for tokens in candidates for head, tail in frames]
        scores = self.scorer.score_tokens(rows)
        size = len(frames)
        return [_mean(scores[at : at + size]) for at in range(0, len(scores), size)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
