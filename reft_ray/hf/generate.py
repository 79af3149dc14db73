"""Greedy answers from a model, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from reft_ray.core.batch import token_batches
from reft_ray.core.conversation import Conversation
from reft_ray.hf.adapter_tools import tokenizer_folder
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.compute import default_device, resolve_dtype
from reft_ray.hf.loading import Base, load_base, load_tokenizer
from reft_ray.hf.lora import ADAPTER_WEIGHTS, attach_saved, merge
from reft_ray.hf.ref_teacher import RefTeacher

BATCH_TOKENS = {"cpu": 8192, "cuda": 65_536}
"""Tokens of one batch of answers: on a GPU a step takes as long for 500 rows as for 50."""


class Responder:
    """Answers conversations greedily: an `evaluation.judges.Respond`."""

    def __init__(
        self, model: nn.Module, chat: ChatFormat, max_new_tokens: int = 64, batch_tokens: int | None = None
    ) -> None:
        self.model = model
        self.chat = chat
        self.max_new_tokens = max_new_tokens
        device = next(model.parameters()).device.type
        self.batch_tokens = batch_tokens or BATCH_TOKENS.get(device, BATCH_TOKENS["cpu"])

    def __call__(self, conversations: Sequence[Conversation]) -> list[str]:
        """One answer per conversation, in order, without special tokens."""
        return self.answers([self.chat.prompt(conversation) for conversation in conversations])

    @torch.inference_mode()
    def answers(self, prompts: Sequence[list[int]]) -> list[str]:
        """One answer per templated prompt, in order, without special tokens."""
        answers = [""] * len(prompts)
        training = self.model.training
        self.model.eval()
        try:
            # Each row grows by up to max_new_tokens, which count against the budget from the start.
            lengths = [len(prompt) + self.max_new_tokens for prompt in prompts]
            for indices in token_batches(lengths, self.batch_tokens):
                for index, answer in zip(indices, self._batch([prompts[i] for i in indices]), strict=True):
                    answers[index] = answer
        finally:
            self.model.train(training)
        return answers

    def _batch(self, prompts: list[list[int]]) -> list[str]:
        ids_BT, mask_BT = self.chat.pad_left(prompts, next(self.model.parameters()).device)
        out_BT = self.model.generate(  # type: ignore[operator]
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.chat.pad_id,
            eos_token_id=sorted(self.chat.stop_ids),
        )
        texts = self.chat.tokenizer.batch_decode(out_BT[:, ids_BT.shape[1] :], skip_special_tokens=True)
        return [text.strip() for text in texts]


def load_student(base: str, student: Path | None, device: str, precision: str = "auto") -> Base:
    """The base, the base with a student's adapter merged in, or a student with full weights.

    With `precision=auto` in bfloat16 on CUDA, else in float32.
    """
    if precision == "auto":
        precision = "bfloat16" if device.startswith("cuda") else "float32"
    dtype = resolve_dtype(precision, device)
    if student is None:
        return load_base(base, dtype, device)
    if not (student / ADAPTER_WEIGHTS).is_file():
        return load_base(str(student), dtype, device)
    loaded = load_base(base, dtype, device)
    # Its own chat template is the one that it was trained with.
    tokenizer = load_tokenizer(tokenizer_folder(student, base))
    return replace(loaded, model=merge(attach_saved(loaded.model, "student", student)), tokenizer=tokenizer)


def load_responder(
    base: str, student: Path | None, max_new_tokens: int = 48, device: str = "cpu", precision: str = "auto"
) -> Responder:
    """A Responder on `load_student`'s model."""
    loaded = load_student(base, student, device, precision)
    return Responder(loaded.model, ChatFormat(loaded.tokenizer), max_new_tokens)


def load_teacher_responder(
    teacher: RefTeacher, base: str | None = None, max_new_tokens: int = 64, precision: str = "auto"
) -> Responder:
    """A Responder on the teacher as it teaches: all of its adapter, or the base itself if it has no weights."""
    device = default_device()
    dtype = resolve_dtype(precision, device)
    loaded = teacher.base(base)
    model = teacher.standalone(loaded)
    return Responder(model.to(device=device, dtype=dtype), ChatFormat(loaded.tokenizer), max_new_tokens)
