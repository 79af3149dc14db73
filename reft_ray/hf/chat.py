"""Chat template to tokens: which tokens are trained, and where the prompt ends.

A conversation is rendered once as text; the text is split at each answer and the pieces are tokenised separately. So
the prompt's tokens are the same with and without an answer, and the prompt's last token is exact. docs/templates.md has
the table of the model families.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Conversation, Example, Message
from reft_ray.core.errors import PromptTooLongError, ReftError, first_line
from reft_ray.hf.control_tokens import ControlTokens
from reft_ray.hf.template import THINK, ChatTemplate
from reft_ray.hf.turns import check_rendered, reasoning_and_answer, template_turns, tools_of

_END_THINK = "</think>"


@dataclass(slots=True)
class _Sequence:
    """The part of a dialogue that is one piece of text: its ids, which of them are learned, where its prompt ends."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    loss_mask: list[bool] = field(default_factory=list)
    last_prompt_index: int = -1
    ended: bool = False
    """Whether its last token is one that the template does not write, so that no turn may follow."""

    def add(self, text: str, ids: Sequence[int], learned: bool) -> None:
        self.text += text
        self.ids += ids
        self.loss_mask += [learned] * len(ids)


class ChatFormat:
    """A tokenizer's chat template (`hf.template`) as the tokens of training rows and prompts.

    With `thinking`, answers without reasoning are learned with an empty thought where the template thinks; otherwise,
    and by default, the thought is closed in the prompt. Reasoning in a row (`<think>...</think>` before the answer, or
    `reasoning_content`) is always learned.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking: bool | None = None) -> None:
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, thinking)
        self.fallback = self._template.fallback
        self.template = self._template.text
        self.control = ControlTokens(tokenizer, self.template)

    @property
    def hash(self) -> str:
        """16 hex digits of the SHA-256 of the template without thinking, which a Ref-Teacher scores and answers in."""
        return hashlib.sha256(self._template.text_for(False).encode()).hexdigest()[:16]

    @property
    def pad_id(self) -> int:
        """The padding id; 0 if the tokenizer has none, as padding is masked anyway."""
        pad = self.tokenizer.pad_token_id
        return int(pad) if isinstance(pad, int) else 0

    def render(self, messages: Sequence[Message], generation: bool, thinking: bool | None = None) -> str:
        """The text of a conversation, followed by the generation prompt if `generation`, for `tokens`.

        Control tokens in content are cut (see `control_tokens`), so that only the template writes them.
        For templates that refuse a system turn (Gemma's) its text is put in front of the first user turn. Raises
        ReftError where the template refuses the conversation.
        """
        messages = self._with_known_roles(messages)
        try:
            return self._apply(messages, generation, thinking)
        except ReftError:
            merged = _merge_system(messages)
            if merged == tuple(messages):
                raise
            return self._apply(merged, generation, thinking)

    def _apply(self, messages: Sequence[Message], generation: bool, thinking: bool | None) -> str:
        turns = template_turns(messages, self.control.cut, self._template.reads_thinking)
        tools = tools_of(messages, self.control.cut)
        wanted = self._template.thinking if thinking is None else thinking
        try:
            return self._template.render(turns, generation, wanted, tools)
        # A template is a program, and fails as it likes on turns that it does not expect.
        except Exception as error:
            reason = first_line(error) if isinstance(error, TemplateError) else type(error).__name__
            raise ReftError(f"the chat template refuses this conversation: {reason}") from None

    def _with_known_roles(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Developer turns as system turns, unless the template knows them."""
        if "developer" in self.template or all(turn.role != "developer" for turn in messages):
            return messages
        return [replace(turn, role="system") if turn.role == "developer" else turn for turn in messages]

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
        """The last of a row's `sequences`: all of the row, unless its template rewrites earlier answers."""
        return self.sequences(example, index, max_tokens)[-1]

    def sequences(self, example: Example, index: int = 0, max_tokens: int | None = None) -> list[TokenizedExample]:
        """One training row; the loss masks cover every trained assistant turn with its end-of-turn token, once.

        Each answer follows exactly the prompt that a server would build. Templates that render an earlier answer
        otherwise than the last one (without its thought) need a sequence for each, the others one for the row.
        `last_prompt_index` is that of a sequence's last prompt; the row's label is on the last sequence, `index` on
        all. Raises PromptTooLongError if the last prompt leaves no space for an answer within `max_tokens` (a longer
        answer is truncated), and ReftError if the template refuses the row or leaves something of it out.
        """
        found = self._sequences(example)
        last = found[-1]
        if last.last_prompt_index < 0:
            raise ReftError("the chat template renders this prompt to no tokens")
        prompt = last.last_prompt_index + 1
        if max_tokens is not None and prompt + int(example.answered) > max_tokens:
            raise PromptTooLongError(f"the prompt has {prompt} tokens, the context holds {max_tokens}")
        return [
            TokenizedExample(
                piece.ids[:max_tokens],
                piece.loss_mask[:max_tokens],
                piece.last_prompt_index,
                example.label if piece is last else None,
                index,
            )
            for piece in found
        ]

    def _sequences(self, example: Example) -> list[_Sequence]:
        messages = example.messages
        found: list[_Sequence] = []
        current = _Sequence()

        def extend(prompt: str) -> _Sequence:
            piece = current
            if piece.ended or not prompt.startswith(piece.text):  # the template renders earlier turns otherwise
                found.append(piece)
                piece = _Sequence()
            piece.add(prompt[len(piece.text) :], self.tokens(prompt[len(piece.text) :]), learned=False)
            piece.last_prompt_index = len(piece.ids) - 1
            return piece

        for at, turn in enumerate(messages):
            last = example.answered and at == len(messages) - 1
            if turn.role != "assistant" or not (turn.trained or last):
                continue
            prompt, answer = self._asked_and_answered(messages[: at + 1])
            current = extend(prompt)
            ids = self.tokens(answer)
            current.ended = turn.trained and bool(ids) and ids[-1] not in self.stop_ids
            current.add(answer, [*ids, self.eos_id] if current.ended else ids, turn.trained)
        if not example.answered:
            current = extend(self.render(messages, generation=True))
        check_rendered(messages, current.text, self.control.cut)
        return [*found, current]

    def _asked_and_answered(self, messages: Conversation) -> tuple[str, str]:
        """The prompt of the last answer, and what the template renders after it up to its end-of-turn token."""
        reasoning, bare = reasoning_and_answer(messages[-1], self.control.cut)
        thinking = True if reasoning else None
        prompt = self.render(messages[:-1], True, thinking)
        answer = self._after(prompt, self.render(messages, False, thinking), reasoning)
        if answer is None:
            # The prompt is what a server sends, so the answer follows it as it is.
            answer = bare.strip() + (self._template.ends or [""])[0]
        if reasoning and reasoning not in answer:
            raise ReftError(f"the chat template does not render the reasoning of messages[{len(messages) - 1}]")
        # Text after the end-of-turn token (a newline in many templates) is never generated, so never trained.
        ends = [answer.rfind(end) + len(end) for end in self._template.ends if end in answer]
        return prompt, answer[: max(ends)] if ends else answer

    def _after(self, prompt: str, full: str, reasoning: str) -> str | None:
        """What follows the prompt in the whole text, None if the two begin differently but for a thought."""
        if full.startswith(prompt):
            return full[len(prompt) :]
        stem, opened, thought = prompt.rpartition(THINK)
        if not opened or not full.startswith(stem):
            return None
        body = full[len(stem) :]
        if body.startswith(THINK) and (_END_THINK not in thought):
            return body.removeprefix(THINK).lstrip("\n")
        if _END_THINK in thought:  # the prompt closes the thought
            empty, closed, rest = body.partition(_END_THINK)
            return rest.lstrip("\n") if closed and not empty.removeprefix(THINK).strip() else body
        lead = body.lstrip("\n")
        return f"{reasoning}\n{_END_THINK}\n\n{lead}"

    @property
    def eos_id(self) -> int:
        """The token that ends an answer if the template writes none."""
        eos = self.tokenizer.eos_token_id
        if not isinstance(eos, int):
            raise ReftError("the tokenizer has no end-of-sequence token: answers would not end")
        return eos

    @property
    def stop_ids(self) -> set[int]:
        """Tokens that end an answer: end of sequence, and what the template writes after an answer or a tool call."""
        ends = [*self._template.ends, str(self.tokenizer.eos_token or "")]
        ids = {self.tokenizer.convert_tokens_to_ids(text) for text in ends if text}
        return {i for i in ids if isinstance(i, int) and i != self.tokenizer.unk_token_id}

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer with this template, which is the one that was trained."""
        self.tokenizer.save_pretrained(folder)
        (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")


def _merge_system(messages: Sequence[Message]) -> Conversation:
    """Put system turns in front of the next user turn."""
    merged: list[Message] = []
    pending = ""
    for turn in messages:
        if turn.role in ("system", "developer"):
            pending += turn.content + "\n\n"
        elif turn.role == "user":
            merged.append(replace(turn, content=pending + turn.content))
            pending = ""
        else:
            merged.append(turn)
    if pending:
        merged.append(Message("user", pending.strip()))
    if merged and messages[0].extra and not merged[0].extra:
        merged[0] = replace(merged[0], extra=messages[0].extra)
    return tuple(merged)
