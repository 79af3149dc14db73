from pathlib import Path

import pytest

from reft_ray.core.conversation import Example, Label, Message, chat
from reft_ray.core.errors import ReftError
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.loading import load_tokenizer
from reft_ray.hf.template import FALLBACK_TEMPLATE

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    "<start>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)


def format_of(folder: Path, template: str | None) -> ChatFormat:
    tokenizer = load_tokenizer(str(folder))
    tokenizer.chat_template = template
    if template and "<|im_end|>" in template:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return ChatFormat(tokenizer)


@pytest.mark.parametrize("template", [None, CHATML, STRICT, "own"])
def test_the_prompt_is_the_same_with_and_without_an_answer(llama: Path, template: str | None) -> None:
    fmt = ChatFormat(load_tokenizer(str(llama))) if template == "own" else format_of(llama, template)
    row = Example(chat("how can i bake bread", "here is how"), Label.HARMLESS)
    encoded = fmt.encode(row)
    assert encoded.ids[: encoded.last_prompt_index + 1] == fmt.prompt(row.prompt)
    assert encoded.loss_mask == [False] * (encoded.last_prompt_index + 1) + [True] * (
        len(encoded) - encoded.last_prompt_index - 1
    )
    answer = fmt.tokenizer.decode(encoded.ids[encoded.last_prompt_index + 1 :])
    assert answer.startswith("here is how")
    assert encoded.ids[-1] in fmt.stop_ids


def test_the_fallback_template_is_used_only_if_there_is_none(llama: Path) -> None:
    fmt = format_of(llama, None)
    assert fmt.fallback
    assert fmt.template == FALLBACK_TEMPLATE
    assert fmt.render(chat("hi", system="be kind"), True).endswith("be kind\n\n### Instruction:\nhi\n\n### Response:\n")
    assert not format_of(llama, CHATML).fallback
    assert fmt.hash != format_of(llama, CHATML).hash


def test_a_template_without_system_turns_gets_the_system_text_in_the_first_user_turn(llama: Path) -> None:
    rendered = format_of(llama, STRICT).render(chat("hi", system="be kind"), True)
    assert "<start>user\nbe kind\n\nhi<end_of_turn>" in rendered


def test_a_template_that_refuses_the_dialogue_is_a_one_line_error(llama: Path) -> None:
    fmt = format_of(llama, "{{ raise_exception('never') }}")
    with pytest.raises(ReftError, match="the chat template refuses this conversation: never"):
        fmt.prompt(chat("hi"))


def test_every_trained_answer_of_a_dialogue_is_learned(llama: Path) -> None:
    fmt = format_of(llama, CHATML)
    dialogue = (
        Message("user", "how can i bake bread"),
        Message("assistant", "here is how"),
        Message("user", "please help"),
        Message("assistant", "sure", trained=False),
        Message("user", "tell me"),
        Message("assistant", "no"),
    )
    encoded = fmt.encode(Example(dialogue))
    learned = fmt.tokenizer.decode([i for i, t in zip(encoded.ids, encoded.loss_mask, strict=True) if t])
    assert learned == "here is how<|im_end|>no<|im_end|>"
    assert fmt.tokenizer.decode(encoded.ids[: encoded.last_prompt_index + 1]) == fmt.render(dialogue[:-1], True)


def test_a_prompt_longer_than_the_context_is_an_error_and_a_long_answer_is_truncated(llama: Path) -> None:
    fmt = format_of(llama, CHATML)
    with pytest.raises(ReftError, match=r"the prompt has \d+ tokens, the context holds 8"):
        fmt.encode(Example(chat("how can i bake bread and more", "here")), max_tokens=8)
    cut = fmt.encode(Example(chat("hi", "here is how " * 50)), max_tokens=40)
    assert len(cut) == 40
    assert cut.loss_mask[-1]
