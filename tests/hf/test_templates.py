"""The table of docs/templates.md, family by family."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from fixtures.templates import CONTROL, FAMILIES, UNFLAGGED, Family
from tokenizers import AddedToken

from reft_ray.core.batch import TokenizedExample
from reft_ray.core.conversation import Conversation, Example, Label, Message, chat
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.encoding import encode_rows
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.control_tokens import special_tokens
from reft_ray.hf.loading import load_tokenizer
from reft_ray.hf.template import FALLBACK_TEMPLATE
from reft_ray.rows.text import conversation_from, messages_json, with_tools

DIALOGUE = (*chat("how can i", "yes"), *chat("please", "maybe"), *chat("tell me", "no"))
THINKING = ("qwen3", "qwen3.5", "r1-distill")
CALL = {"id": "abcdef123", "type": "function", "function": {"name": "look", "arguments": '{"city": "Paris"}'}}
TOOL = {"type": "function", "function": {"name": "look", "description": "Looks out", "parameters": {}}}
TURNS = [
    {"role": "user", "content": "how can i"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": 'sun "and" rain', "tool_call_id": "abcdef123", "name": "look"},
    {"role": "assistant", "content": "no"},
]
TOOL_TALK = with_tools(conversation_from(TURNS), {"tools": [TOOL]})


def format_of(llama: Path, family: Family | str, thinking: bool | None = None) -> ChatFormat:
    found = FAMILIES[family] if isinstance(family, str) else family
    tokenizer = load_tokenizer(str(llama))
    tokenizer.add_special_tokens({"additional_special_tokens": list(CONTROL)})
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in UNFLAGGED])
    tokenizer.eos_token, tokenizer.chat_template = found.eos, found.template
    return ChatFormat(tokenizer, thinking)


def learned(fmt: ChatFormat, rows: list[TokenizedExample]) -> list[str]:
    """Each run of learned tokens as text."""
    runs: list[list[int]] = []
    for row in rows:
        before = False
        for token, is_learned in zip(row.ids, row.loss_mask, strict=True):
            if is_learned and not before:
                runs.append([])
            if is_learned:
                runs[-1].append(token)
            before = is_learned
    return [fmt.tokenizer.decode(run) for run in runs]


def sequences(fmt: ChatFormat, messages: Conversation) -> list[TokenizedExample]:
    return fmt.sequences(Example(messages))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_answer_is_learned_once_after_the_prompt_of_a_server(llama: Path, name: str) -> None:
    family = FAMILIES[name]
    fmt = format_of(llama, name)
    rows = sequences(fmt, DIALOGUE)
    answers = [family.answer.replace("no", text) + family.end for text in ("yes", "maybe", "no")]
    assert learned(fmt, rows) == answers
    assert len(rows) == (3 if family.rewrites else 1)
    last = rows[-1]
    prompt = fmt.prompt(DIALOGUE[:-1])
    assert last.ids[: last.last_prompt_index + 1] == prompt
    assert fmt.tokenizer.decode(prompt).endswith(family.prompt_end)
    first = fmt.prompt(DIALOGUE[:1])
    assert rows[0].ids[: len(first)] == first
    assert last.ids[-1] in fmt.stop_ids
    assert fmt.stop_ids == {fmt.tokenizer.convert_tokens_to_ids(t) for t in {family.eos, family.end}} | (
        {fmt.tokenizer.convert_tokens_to_ids("<|call|>")} if name == "gpt-oss" else set()
    )


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn_is_in_the_prompt(llama: Path, name: str) -> None:
    fmt = format_of(llama, name)
    for role in ("system", "developer"):
        dialogue = (Message(role, "be kind"), *chat("hi", "no"))
        if name == "r1-distill":  # as it is above, without system turns
            with pytest.raises(ReftError, match=r"does not render messages\[0\].content"):
                sequences(fmt, dialogue)
        else:
            text = fmt.tokenizer.decode(sequences(fmt, dialogue)[0].ids)
            assert text.index("be kind") < text.index("hi")


@pytest.mark.parametrize("name", FAMILIES)
def test_tool_calls_are_rendered_as_the_template_says_or_the_row_is_refused(llama: Path, name: str) -> None:
    family = FAMILIES[name]
    fmt = format_of(llama, name)
    if family.tools is None:
        with pytest.raises(ReftError, match=r"the chat template (does not render|refuses)"):
            sequences(fmt, TOOL_TALK)
        return
    rows = sequences(fmt, TOOL_TALK)
    end = "<|call|>" if name == "gpt-oss" else family.end
    assert learned(fmt, rows) == [family.tools + end, family.answer + family.end]
    text = fmt.tokenizer.decode(rows[-1].ids)
    assert "Looks out" in text
    assert re.search(r'sun \\?"and\\?" rain', text)


def test_what_a_template_drops_is_named(llama: Path) -> None:
    fmt = format_of(llama, "llama-3.1")
    beside = conversation_from([TURNS[0], {**TURNS[1], "content": "let me look"}])
    cases = {
        "messages[1].content": beside,
        "messages[1].refusal": conversation_from(
            [TURNS[0], {"role": "assistant", "content": "no", "refusal": "I can't"}]
        ),
        "the reasoning of messages[1]": conversation_from(
            [TURNS[0], {"role": "assistant", "content": "no", "reasoning_content": "it is bad"}]
        ),
        "two calls": conversation_from([TURNS[0], {**TURNS[1], "tool_calls": [CALL, CALL]}]),
        "not JSON": conversation_from(
            [TURNS[0], {**TURNS[1], "tool_calls": [{"function": {"name": "look", "arguments": "Paris"}}]}]
        ),
    }
    messages = {}
    for name, turns in cases.items():
        with pytest.raises(ReftError) as caught:
            sequences(fmt, turns)
        messages[name] = str(caught.value)
    assert messages == {
        "messages[1].content": "the chat template does not render messages[1].content",
        "messages[1].refusal": "the chat template does not render messages[1].refusal",
        "the reasoning of messages[1]": "the chat template does not render the reasoning of messages[1]",
        "two calls": "the chat template refuses this conversation: This model only supports single tool-calls at once!",
        "not JSON": "messages[1].tool_calls[0]: the arguments are not a JSON object",
    }
    deep: object = "x"
    for _ in range(20_000):
        deep = [deep]
    nested = [TURNS[0], {**TURNS[1], "tool_calls": [{"function": {"name": "look", "arguments": deep}}]}]
    with pytest.raises(ReftError, match=r"messages\[1\] has a tool call that cannot be read"):
        sequences(fmt, conversation_from(nested))
    no_tools = format_of(llama, "smollm2")
    with pytest.raises(ReftError, match="does not render tools"):
        sequences(no_tools, with_tools(chat("hi", "no"), {"tools": [TOOL]}))


def test_rows_that_a_template_refuses_are_left_out_with_their_line(llama: Path) -> None:
    rows = [Example(chat("hi", "no"), place="row 1"), Example(TOOL_TALK, place="row 2")]
    fitted = encode_rows(format_of(llama, "phi-3"), rows, None)
    assert [row.place for row in fitted.rows] == ["row 1"]
    assert fitted.skipped.note == "row 2: the chat template does not render messages[1].tool_calls[0].name: left out"


@pytest.mark.parametrize("name", THINKING)
def test_no_empty_thought_is_learned_unless_asked(llama: Path, name: str) -> None:
    fmt = format_of(llama, name)
    assert not any("think" in text for text in learned(fmt, sequences(fmt, DIALOGUE)))
    asked = format_of(llama, name, thinking=True)
    last = learned(asked, sequences(asked, DIALOGUE))[-1]
    assert last.endswith("\n</think>\n\nno" + FAMILIES[name].end)
    assert asked.hash == fmt.hash != ChatFormat(load_tokenizer(str(llama))).hash


@pytest.mark.parametrize("name", [*THINKING, "gpt-oss"])
@pytest.mark.parametrize("spelling", ["in the content", "beside it"])
def test_reasoning_in_a_row_is_learned(llama: Path, name: str, spelling: str) -> None:
    answer = {"role": "assistant", "content": "<think>\nit is bad\n</think>\n\nno"}
    if spelling == "beside it":
        answer = {"role": "assistant", "content": "no", "reasoning_content": "it is bad"}
    fmt = format_of(llama, name)
    (text,) = learned(fmt, sequences(fmt, conversation_from([TURNS[0], answer])))
    wanted = {
        "qwen3": "<think>\nit is bad\n</think>\n\nno<|im_end|>",
        "qwen3.5": "it is bad\n</think>\n\nno<|im_end|>",
        "r1-distill": "it is bad\n</think>\n\nno<|end_of_sentence|>",
        "gpt-oss": "<|channel|>analysis<|message|>it is bad<|end|>"
        "<|start|>assistant<|channel|>final<|message|>no<|return|>",
    }
    assert text == wanted[name]


def test_a_prompt_is_the_same_on_every_day(llama: Path) -> None:
    for name, written in (("llama-3.2", "26 Jul 2024"), ("gpt-oss", "2024-07-26")):
        fmt = format_of(llama, name)
        assert written in fmt.tokenizer.decode(fmt.prompt(chat("hi")))
        assert "strftime_now(" not in fmt.template


def test_the_label_is_on_the_last_sequence_and_weights_hold(llama: Path) -> None:
    fmt = format_of(llama, "qwen3")
    row = Example(
        (*chat("how", "yes"), replace(chat("x", "maybe")[1], trained=False), *chat("tell me", "no")), Label.HARMFUL
    )
    rows = fmt.sequences(row, 7)
    assert [(found.label, found.index) for found in rows] == [(None, 7), (Label.HARMFUL, 7)]
    assert learned(fmt, rows) == ["yes<|im_end|>", "no<|im_end|>"]
    asked = fmt.sequences(Example((*chat("how", "yes"), Message("user", "and"))))
    assert learned(fmt, asked) == ["yes<|im_end|>"]
    assert asked[-1].ids == fmt.prompt((*chat("how", "yes"), Message("user", "and")))


@pytest.mark.parametrize("name", [*FAMILIES, "no template"])
@pytest.mark.parametrize("thinking", [False, True])
def test_the_exported_tokenizer_asks_as_training_did(llama: Path, tmp_path: Path, name: str, thinking: bool) -> None:
    family = FAMILIES.get(name) or replace(FAMILIES["smollm2"], template="")
    fmt = format_of(llama, family, thinking)
    fmt.save_tokenizer(tmp_path)
    read = load_tokenizer(str(tmp_path))
    question = [{"role": "user", "content": "how can i"}]
    plain = read.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
    assert plain == fmt.render(chat("how can i"), True)
    again = ChatFormat(read)
    assert (again.hash, again.template) == (fmt.hash, fmt.template)
    assert sequences(again, DIALOGUE) == sequences(fmt, DIALOGUE)
    assert (again.template == FALLBACK_TEMPLATE) is (name == "no template")


def test_control_tokens_without_a_role_are_known(llama: Path) -> None:
    fmt = format_of(llama, "llama-3.1")
    assert {"<|eot_id|>", "<|start_header_id|>", *fmt.tokenizer.all_special_tokens} <= special_tokens(fmt.tokenizer)
    assert "<think>" not in special_tokens(fmt.tokenizer)


def test_tool_talk_survives_the_way_to_training() -> None:
    assert conversation_from(json.loads(messages_json(TOOL_TALK))) == TOOL_TALK
