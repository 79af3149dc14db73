"""Guards from local models next to the teacher: a sequence classifier, or a generator that answers safe or unsafe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reft_ray.core.cascade import Opinion
from reft_ray.core.conversation import Conversation, Message, parts
from reft_ray.core.errors import PromptTooLongError, ReftError
from reft_ray.core.verdict import finite
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.classifier import harm_probability
from reft_ray.hf.compute import default_device
from reft_ray.hf.generate import Responder, load_student
from reft_ray.hf.loading import Base, load_classifier

HARMLESS_LABELS = frozenset(
    {"safe", "benign", "harmless", "neutral", "ok", "normal", "non-toxic", "not_toxic", "non_toxic", "label_0"}
)
_OVERLAP = 32
_BATCH = 16


class ClassifierGuard:
    """A sequence classifier over parts of a conversation; the most harmful window of the most harmful part counts.

    All labels but `HARMLESS_LABELS` mean harm, unless `harmful` names those that do.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        guard_id: str,
        threshold: float = 0.5,
        harmful: Sequence[str] = (),
    ) -> None:
        labels: dict[int, str] = {int(i): str(label) for i, label in (model.config.id2label or {}).items()}
        named = {label.lower() for label in harmful}
        chosen = [
            i
            for i, label in labels.items()
            if (label.lower() in named if named else label.lower() not in HARMLESS_LABELS)
        ]
        if not chosen or len(chosen) == len(labels) > 1:
            raise ReftError(f"guard {guard_id}: which of the labels {', '.join(labels.values())} mean harm? name them")
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._harmful_ids = chosen
        limit = getattr(model.config, "max_position_embeddings", None) or 512
        self._window = min(int(limit), 512)
        self.guard_id = guard_id
        self.threshold = threshold

    @classmethod
    def load(
        cls,
        path: str,
        threshold: float = 0.5,
        harmful: Sequence[str] = (),
        device: str | None = None,
        guard_id: str | None = None,
    ) -> ClassifierGuard:
        """A classifier from a directory of safetensors. Raises ReftError if there is none."""
        return cls(*load_classifier(path, device), guard_id or f"classifier:{Path(path).name}", threshold, harmful)

    @torch.inference_mode()
    def opinions(self, conversations: Sequence[Conversation]) -> list[Opinion]:
        """One Opinion per conversation, in order; a conversation without text counts as harmful."""
        found = [(owner, part) for owner, turns in enumerate(conversations) for part in parts(turns)]
        texts = [part.text for _, part in found]
        worst: dict[int, Opinion] = {}
        for start in range(0, len(texts), _BATCH):
            for text, score in self._scores(texts[start : start + _BATCH]):
                owner, part = found[start + text]
                if owner not in worst or finite(score) > worst[owner].probability:
                    worst[owner] = Opinion(finite(score), part=part.name)
        return [worst.get(owner, Opinion(1.0)) for owner in range(len(conversations))]

    def _scores(self, texts: list[str]) -> Iterator[tuple[int, float]]:
        """(index of the text, probability) for each window of each text."""
        cut = self._tokenizer(
            texts,
            truncation=True,
            max_length=self._window,
            stride=_OVERLAP,
            return_overflowing_tokens=True,
            # A [SEP] in the text is text.
            split_special_tokens=True,
        )
        owners = cut["overflow_to_sample_mapping"]
        for start in range(0, len(owners), _BATCH):
            windows = cut["input_ids"][start : start + _BATCH]
            harm_B = self._harm(windows)
            yield from zip(owners[start : start + _BATCH], harm_B.tolist(), strict=True)

    def _harm(self, windows: list[list[int]]) -> Tensor:
        padded = self._tokenizer.pad({"input_ids": windows}, return_tensors="pt").to(self._model.device)
        inputs = {name: padded[name] for name in ("input_ids", "attention_mask")}
        return harm_probability(self._model, inputs, self._harmful_ids)


class GeneratorGuard:
    """A chat model that answers with one of two words, such as Llama Guard's `safe` and `unsafe`.

    The probability compares the likelihoods of the two answers, so nothing is generated or parsed. A dialogue that the
    template refuses or that is too long is judged part by part, window by window; so are tool calls.
    """

    def __init__(
        self, base: Base, guard_id: str, threshold: float = 0.5, safe: str = "safe", unsafe: str = "unsafe"
    ) -> None:
        self._model = base.model
        self._chat = ChatFormat(base.tokenizer)
        # Some releases of Llama Guard begin their answer with blank lines, others do not.
        self._answers = [self._chat.tokens(lead + word) for word in (safe, unsafe) for lead in ("", "\n\n")]
        if self._answers[0] == self._answers[2]:
            raise ReftError(f"guard {guard_id}: the answers {safe} and {unsafe} are the same tokens")
        self._max_tokens = min(base.context, 8192) - max(map(len, self._answers))
        self.guard_id = guard_id
        self.threshold = threshold

    @classmethod
    def load(
        cls,
        path: str,
        threshold: float = 0.5,
        device: str | None = None,
        guard_id: str | None = None,
        **words: str,
    ) -> GeneratorGuard:
        """A generator from a directory of safetensors; `words` may replace the answers `safe` and `unsafe`."""
        return cls(
            load_student(path, None, device or default_device()),
            guard_id or f"generator:{Path(path).name}",
            threshold,
            **words,
        )

    @torch.inference_mode()
    def opinions(self, conversations: Sequence[Conversation]) -> list[Opinion]:
        """One Opinion per conversation, in order; a conversation without text counts as harmful."""
        return [Opinion(max(map(self._probability, self._prompts(turns)), default=1.0)) for turns in conversations]

    def _prompts(self, conversation: Conversation) -> list[list[int]]:
        texts = [part.text for part in parts(conversation)]
        try:
            whole = self._chat.tokens(self._chat.render(conversation, generation=True)) if texts else []
        except ReftError:
            whole = []
        if not whole or len(whole) > self._max_tokens:
            return self._in_windows(texts)
        # Templates do not render the calls.
        return [whole, *self._in_windows([call.text for turn in conversation for call in turn.calls])]

    def _in_windows(self, texts: Sequence[str]) -> list[list[int]]:
        frame = len(self._prompt(""))
        if texts and frame >= self._max_tokens:
            raise ReftError(f"guard {self.guard_id}: its chat template alone is longer than its context")
        return [
            self._prompt(str(self._chat.tokenizer.decode(window)))
            for text in texts
            for window in _windows(self._chat.tokens(self._chat.control.cut(text)), (self._max_tokens - frame) * 3 // 4)
        ]

    def _prompt(self, text: str) -> list[int]:
        return self._chat.tokens(self._chat.render((Message("user", text),), generation=True))

    def _probability(self, prompt: list[int]) -> float:
        rows = [prompt + answer for answer in self._answers]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([row + [self._chat.pad_id] * (longest - len(row)) for row in rows])
        mask_BT = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        device = self._model.device
        logits_BTV = self._model(input_ids=ids_BT.to(device), attention_mask=mask_BT.to(device)).logits
        likelihoods = [
            _likelihood(logits_BTV[index, len(prompt) - 1 : len(prompt) - 1 + len(answer)], answer)
            for index, answer in enumerate(self._answers)
        ]
        safe, unsafe = torch.stack(likelihoods).view(2, 2).logsumexp(dim=1)
        return finite(float(torch.sigmoid(unsafe - safe)))


class AskedText(Protocol):
    """A question to a generating guard: `messages` for the chat template, or the whole prompt as `raw`."""

    @property
    def messages(self) -> Conversation: ...

    @property
    def raw(self) -> str: ...


class LocalReplies:
    """Replies of a local chat model, generated greedily."""

    def __init__(self, base: Base) -> None:
        self._base = base
        self._chat = ChatFormat(base.tokenizer)

    @classmethod
    def load(cls, path: str, device: str | None = None) -> LocalReplies:
        """A model from a directory of safetensors. Raises ReftError if there is none."""
        return cls(load_student(path, None, device or default_device()))

    def __call__(self, questions: Sequence[AskedText], tokens: int) -> list[str]:
        """One reply per question, of at most `tokens` tokens. Raises PromptTooLongError."""
        prompts = [self._prompt(question) for question in questions]
        if any(len(prompt) + tokens > self._base.context for prompt in prompts):
            raise PromptTooLongError(
                f"a question to the guard is longer than its context of {self._base.context} tokens; "
                "lower the guard's `characters`"
            )
        return Responder(self._base.model, self._chat, tokens).answers(prompts)

    def _prompt(self, question: AskedText) -> list[int]:
        if not question.raw:
            return self._chat.prompt(question.messages)
        bos = self._chat.tokenizer.bos_token_id
        return [*([bos] if isinstance(bos, int) else []), *self._chat.tokens(question.raw)]


def _likelihood(logits_TV: Tensor, answer: list[int]) -> Tensor:
    chosen = torch.tensor(answer, device=logits_TV.device)
    return logits_TV.float().log_softmax(dim=-1).gather(1, chosen[:, None]).sum()


def _windows(ids: list[int], size: int) -> list[list[int]]:
    """Overlapping windows over all ids; nothing is truncated."""
    step = max(1, size - _OVERLAP)
    return [ids[start : start + size] for start in range(0, max(1, len(ids) - _OVERLAP), step)]
