"""A tokenizer's chat template with what training fixes: its date, and whether the model thinks.

| template | without thinking, the default |
|---|---|
| has a switch `enable_thinking` (Qwen3, Qwen3.5) | the switch is off: the prompt ends after an empty thought |
| always opens a thought (Qwen3-Thinking, R1-Distill) | the prompt closes it |
| today's date (Llama 3.2, gpt-oss) | `DATE`, so that the same rows are the same tokens on every day |

All of it is in the text of the template, so that a server that reads the exported template asks as training did.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import date
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

# For base models without a template: the Alpaca format, which the finetuning literature uses for such models.
FALLBACK_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}"
    "{% if m['role'] in ('system', 'developer') %}{{ m['content'] }}\n\n"
    "{% elif m['role'] == 'assistant' %}### Response:\n{{ m['content'] }}{{ eos_token }}\n\n"
    "{% else %}### Instruction:\n{{ m['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}### Response:\n{% endif %}"
)
DATE = date(2024, 7, 26)
"""The day in every prompt: the one that Llama 3.1's template names itself."""

THINK = "<think>"
_DEFAULT = "{{%- if enable_thinking is not defined %}}{{%- set enable_thinking = {} %}}{{%- endif %}}"
_EXPORTED = re.compile(re.escape(_DEFAULT.format("VALUE")).replace("VALUE", "(true|false)"))
_CLOSE = "{%- if add_generation_prompt and not enable_thinking %}{{- '\\n</think>\\n\\n' }}{%- endif %}"
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_QUESTION: list[dict[str, Any]] = [{"role": "user", "content": "question"}]
_ANSWER = "answer-0"
_CALL = {"id": "call12345", "type": "function", "function": {"name": "ask", "arguments": {"about": _ANSWER}}}


class ChatTemplate:
    """The template of a tokenizer, or `FALLBACK_TEMPLATE`.

    `thinking` is what it does unless a row says otherwise. None: as an exported template says, otherwise not.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, thinking: bool | None = None) -> None:
        self._tokenizer = tokenizer
        self.fallback = not tokenizer.chat_template
        template = FALLBACK_TEMPLATE if self.fallback else str(tokenizer.chat_template)
        exported = _EXPORTED.match(template)
        self.thinking = exported is not None and exported[1] == "true" if thinking is None else thinking
        template = template[exported.end() :] if exported else template
        self._fixed = _TODAY.sub(lambda call: repr(DATE.strftime(call[2])), template)
        self._closes = THINK in template and self._opens_thought()
        self._switches = self._closes or "enable_thinking" in template
        self.text = self.text_for(self.thinking)
        self.thinks = self._switches and THINK in template
        """Whether prompts of this template say if the model is to think between <think> and </think>."""
        self.reads_thinking = ".thinking" in template
        """Whether reasoning is a value of its own in the template (gpt-oss) and no part of the content."""

    def text_for(self, thinking: bool) -> str:
        """The template whose default is to think or not to."""
        if not self._switches:
            return self._fixed
        close = _CLOSE if self._closes else ""
        return _DEFAULT.format(str(thinking).lower()) + self._fixed + close

    def render(self, turns: Sequence[dict[str, Any]], generation: bool, thinking: bool, tools: Any = None) -> str:
        """The text of turns, and of the generation prompt. Raises jinja2's TemplateError where the template does."""
        options = {"enable_thinking": thinking} if self._switches else {}
        return self._apply(self.text, turns, generation, tools, **options)

    @cached_property
    def ends(self) -> list[str]:
        """The control tokens that the template writes after an answer and after a tool call: what ends generation."""
        answer: dict[str, Any] = {"role": "assistant", "content": _ANSWER}
        call: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
        return list(dict.fromkeys(filter(None, map(self._end_of, (answer, call)))))

    def _end_of(self, turn: dict[str, Any]) -> str:
        try:
            text = self.render([*_QUESTION, turn], False, False)
        except Exception:  # the template knows no such turn
            return ""
        tail = text.rpartition(_ANSWER)[2] if _ANSWER in text else ""
        special = [t.content for t in self._tokenizer.added_tokens_decoder.values() if t.special]
        found = [(tail.index(token), -len(token), token) for token in special if token in tail]
        return min(found)[2] if found else ""

    def _opens_thought(self) -> bool:
        """Whether the generation prompt opens a thought even where thinking is switched off."""
        try:
            prompt = self._apply(self._fixed, _QUESTION, True, enable_thinking=False)
        except Exception:  # it will say so of every conversation
            return False
        return prompt.rstrip().endswith(THINK)

    def _apply(
        self, text: str, turns: Sequence[dict[str, Any]], generation: bool, tools: Any = None, **options: Any
    ) -> str:
        options |= {"tokenize": False, "add_generation_prompt": generation}
        return str(self._tokenizer.apply_chat_template(list(turns), tools=tools, chat_template=text, **options))
