"""Chat template to tokens: which tokens are trained, and where the prompt ends.

A conversation is rendered once as text; the text is split at each answer and the pieces are tokenised separately. So
the prompt's tokens are the same with and without an answer, and the prompt's last token is exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Conversation, Example, Message
from reft_ray.core.errors import PromptTooLongError, ReftError
from reft_ray.hf.control_tokens import ControlTokens

# For base models without a template: the Alpaca format, which the finetuning literature uses for such models.
FALLBACK_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{% if m['role'] in ('system', 'developer') %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)


class ChatFormat:
    """A tokenizer's chat template, or `FALLBACK_TEMPLATE`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.fallback = not tokenizer.chat_template
        self.template: str = FALLBACK_TEMPLATE if self.fallback else str(tokenizer.chat_template)
        self.control = ControlTokens(tokenizer, self.template)

    @property
    def hash(self) -> str:
        """16 hex digits of the template's SHA-256."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:16]

    @property
    def pad_id(self) -> int:
        """The padding id; 0 if the tokenizer has none, as padding is masked anyway."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else 0

    def render(self, messages: Sequence[Message], generation: bool) -> str:
        """The text of a conversation, followed by the generation prompt if `generation`, for `tokens`.

        Control tokens in content are cut (see `control_tokens`), so that only the template writes them.
        For templates that refuse a system turn (Gemma's) its text is put in front of the first user turn.
        """
        try:
            return self._apply(messages, generation)
        except TemplateError as error:
            merged = _merge_system(messages)
            if merged == tuple(messages):
                raise ReftError(f"the chat template refuses this conversation: {error}") from None
            try:
                return self._apply(merged, generation)
            except TemplateError as second:
                raise ReftError(f"the chat template refuses this conversation: {second}") from None

    def _apply(self, messages: Sequence[Message], generation: bool) -> str:
        turns: list[dict[str, Any]] = [
            {"role": turn.role, "content": self.control.cut(turn.content, turn.role)} for turn in messages
        ]
        text = self.tokenizer.apply_chat_template(
            turns, chat_template=self.template, tokenize=False, add_generation_prompt=generation
        )
        return str(text)

    def tokens(self, text: str) -> list[int]:
        """Ids of rendered text; the template's control tokens are recognised, none is added."""
        return self.control.tokenize([text])[0]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Ids of the templated prompt with the generation prompt."""
        return self.tokens(self.render(messages, generation=True))

    def pad_left(self, prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Ids and attention mask of prompts to be continued, both [B, T]."""
        width = max(map(len, prompts))
        ids_BT = torch.tensor([[self.pad_id] * (width - len(ids)) + ids for ids in prompts], device=device)
        mask_BT = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device)
        return ids_BT, mask_BT

    def encode(self, example: Example, index: int = 0, max_tokens: int | None = None) -> TokenizedExample:
        """One training row; the loss mask covers every trained assistant turn with its end-of-turn token.

        `last_prompt_index` is that of the last turn's prompt. Raises PromptTooLongError if the prompt leaves no space
        for an answer within `max_tokens`; a longer answer is truncated.
        """
        prompt_text = self.render(example.prompt, generation=True)
        ids, loss_mask = self._history(example.prompt, prompt_text)
        last_prompt_index = len(ids) - 1
        if not ids:
            raise ReftError("the chat template renders this prompt to no tokens")
        if max_tokens is not None and len(ids) + int(example.answered) > max_tokens:
            raise PromptTooLongError(f"the prompt has {len(ids)} tokens, the context holds {max_tokens}")
        if example.answered:
            answer = self.tokens(self._answer(example.messages, prompt_text))
            if answer and example.messages[-1].trained and answer[-1] not in self.stop_ids:
                answer.append(self.eos_id)
            ids += answer
            loss_mask += [example.messages[-1].trained] * len(answer)
        row = TokenizedExample(ids, loss_mask, last_prompt_index, example.label, index)
        if max_tokens is not None and len(row) > max_tokens:
            row = replace(row, ids=ids[:max_tokens], loss_mask=loss_mask[:max_tokens])
        return row

    def _answer(self, messages: Conversation, prompt_text: str) -> str:
        """The text that the template renders after the prompt for the last answer, up to its end-of-turn token.

        If a template's generation prompt differs from how it renders an answer (a thinking block): the bare answer.
        """
        full = self.render(messages, generation=False)
        if not full.startswith(prompt_text):
            return self.control.cut(messages[-1].content, "assistant").strip() + str(self.tokenizer.eos_token or "")
        answer = full[len(prompt_text) :]
        # Text after the end-of-turn token (a newline in many templates) is never generated, so never trained.
        ends = [answer.rfind(stop) + len(stop) for stop in self._stop_texts() if stop in answer]
        return answer[: max(ends)] if ends else answer

    def _history(self, prompt: Conversation, prompt_text: str) -> tuple[list[int], list[bool]]:
        """Ids and loss mask of the prompt; earlier answers are trained if they can be found in the rendered text."""
        ids: list[int] = []
        loss_mask: list[bool] = []
        done = ""
        for i, turn in enumerate(prompt):
            if turn.role != "assistant" or not turn.trained:
                continue
            before = self.render(prompt[:i], generation=True)
            upto = before + self._answer(prompt[: i + 1], before)
            if not (before.startswith(done) and prompt_text.startswith(upto)):
                break  # the template rewrites earlier turns
            context, answer = self.tokens(before[len(done) :]), self.tokens(upto[len(before) :])
            ids += context + answer
            loss_mask += [False] * len(context) + [True] * len(answer)
            done = upto
        rest = self.tokens(prompt_text[len(done) :])
        return ids + rest, loss_mask + [False] * len(rest)

    @property
    def eos_id(self) -> int:
        """The token that ends an answer if the template writes none."""
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ReftError("the tokenizer has no end-of-sequence token: answers would not end")
        return eos

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer: end of sequence, and the common end-of-turn tokens in the vocabulary."""
        ids = {self.tokenizer.convert_tokens_to_ids(text) for text in self._stop_texts()}
        return {i for i in ids if isinstance(i, int) and i != self.tokenizer.unk_token_id}

    def _stop_texts(self) -> list[str]:
        known = ["<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<turn|>"]
        eos = [str(self.tokenizer.eos_token)] if self.tokenizer.eos_token else []
        return eos + [token for token in known if token in self.tokenizer.get_added_vocab()]


def _merge_system(messages: Sequence[Message]) -> Conversation:
    """Put system turns in front of the next user turn; other roles become user turns."""
    merged: list[Message] = []
    pending = ""
    for turn in messages:
        if turn.role in ("system", "developer"):
            pending += turn.content + "\n\n"
        elif turn.role == "assistant":
            merged.append(turn)
        else:
            merged.append(Message("user", pending + turn.content))
            pending = ""
    if pending:
        merged.append(Message("user", pending.strip()))
    return tuple(merged)
