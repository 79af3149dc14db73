"""Lines of a body become rows to judge, or faults."""

import asyncio
import json
from collections.abc import AsyncIterator

import pytest

from reft_ray.api.rows import lines, parse_row
from reft_ray.core.conversation import parts, row_id
from reft_ray.core.scoring import judge
from reft_ray.core.verdict import Decision
from reft_ray.rows.text import conversation_from
from reft_ray.testbed.word_scorer import WordScorer


@pytest.mark.parametrize(
    ("line", "code"),
    [
        (b"", "empty_line"),
        (b"  \r", "empty_line"),
        (b"{", "invalid_json"),
        (b"\xff", "invalid_utf8"),
        (b"[" * 50_000, "invalid_json"),
        (b'{"text": ' + b"9" * 5000 + b"}", "invalid_json"),
        (b"3", "data_type"),
        (b"{}", "missing_messages_list"),
        (b'{"messages": []}', "missing_messages_list"),
        (b'{"messages": [3]}', "message_missing_key"),
        (b'{"messages": [{"content": "a"}]}', "message_missing_key"),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', "unrecognized_role"),
        (b'{"messages": [{"role": "king", "content": "a"}]}', "unrecognized_role"),
        (b'{"messages": [{"role": "user"}]}', "missing_content"),
        (b'{"messages": [{"role": "user", "content": " "}]}', "missing_content"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "data_type"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "data_type"),
        (
            b'{"messages": [{"role": "user", "content": [{"type": "image_url", "text": "a", "image_url": {}}]}]}',
            "data_type",
        ),
        (b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "b"}]}]}', "data_type"),
        (b'{"messages": [{"role": "user", "content": "a", "images": ["b"]}]}', "unsupported_content"),
        (b'{"text": "a", "images": ["b"]}', "unsupported_content"),
        (b'{"prompt": 3}', "data_type"),
        (b'{"prompt": "how to build a bomb", "prompt": "hello"}', "ambiguous_keys"),
        (b'{"text": "a", "meta": [{"x": {"k": 1, "\\u006b": 2}}]}', "ambiguous_keys"),
        (b'{"prompt": "a", "completion": []}', "data_type"),
        (b'{"text": ""}', "missing_content"),
    ],
)
def test_a_bad_line_names_its_fault(line: bytes, code: str) -> None:
    row = parse_row(4, line)
    assert row.conversation is None
    assert row.error is not None
    assert (row.number, row.error.code) == (4, code)


@pytest.mark.parametrize(
    ("value", "roles"),
    [
        ({"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]}, ["system", "user"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "u"}]}]}, ["user"]),
        ({"messages": [{"role": "user", "content": [{"text": "u", "image": None}]}], "images": []}, ["user"]),
        (
            {"messages": [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": [1]}]},
            ["user", "assistant"],
        ),
        ({"prompt": "p", "completion": "c"}, ["user", "assistant"]),
        ({"text": "t"}, ["user"]),
    ],
)
def test_a_good_line_is_a_conversation(value: dict[str, object], roles: list[str]) -> None:
    row = parse_row(0, b"\xef\xbb\xbf" + json.dumps(value).encode() + b"\r")
    assert row.error is None
    assert row.conversation is not None
    assert [turn.role for turn in row.conversation] == roles


def test_tool_calls_and_tool_definitions_are_parts_of_a_row() -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "run", "arguments": '{"how": "a \\u0062omb"}'}}
    turns = [{"role": "user", "content": "u"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    row = parse_row(0, json.dumps({"messages": turns, "tools": [{"description": "a knife"}]}).encode())
    assert row.conversation is not None
    assert [(part.name, part.text) for part in parts(row.conversation)] == [
        ("messages[0].user", "u"),
        ("messages[1].assistant.tool_calls[0]", "name: run\nhow: a bomb"),
        ("messages[2].tool", "description: a knife"),
    ]
    alone = parse_row(0, json.dumps({"messages": turns[1:]}).encode())
    assert alone.error is None


ASKED = {"role": "user", "content": "hello"}
ANSWERED = {"role": "assistant", "content": "ok"}
BAD = "how to build a bomb"


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ({"prompt": "hello", "chosen": BAD, "rejected": "no"}, "messages[1].assistant"),
        ({"prompt": "hello", "chosen": "no", "rejected": BAD}, "messages[2].assistant"),
        ({"prompt": "hello", "chosen": [ANSWERED | {"content": BAD}]}, "messages[1].tool"),
        ({"prompt": "hello", "completion": "ok", "response": BAD}, "messages[2].assistant"),
        ({"prompt": "hello", "completion": None, "response": BAD}, "messages[1].assistant"),
        ({"prompt": "hello", "answer": BAD}, "messages[1].tool"),
        ({"prompt": "hello", "extra": {"answers": [{"a": BAD}]}}, "messages[1].tool"),
        ({"prompt": "hello", "id": BAD}, "messages[1].tool"),
        ({"text": "hello", "completion": BAD}, "messages[1].assistant"),
        ({"messages": [ASKED], "prompt": BAD}, "messages[1].tool"),
        (
            {"messages": [ASKED, ANSWERED | {"reasoning_content": BAD}]},
            "messages[1].assistant.reasoning_content",
        ),
        ({"messages": [ASKED, ANSWERED | {"refusal": BAD}]}, "messages[1].assistant.refusal"),
        ({"messages": [ASKED | {"name": BAD}, ANSWERED]}, "messages[0].user.name"),
        ({"messages": [ASKED | {"k" * 99: BAD}]}, "messages[0].user." + "k" * 40),
        ({"messages": [ASKED | {"content": [{"type": "text", "text": "a", "note": BAD}]}]}, "messages[0].user.note"),
    ],
)
def test_text_under_any_key_is_judged(value: dict[str, object], part: str) -> None:
    row = parse_row(0, json.dumps(value).encode())
    assert row.conversation is not None
    (verdict,) = judge(WordScorer(), [row.conversation])
    assert (verdict.decision, verdict.part) == (Decision.BLOCK, part)


def test_metadata_of_a_row_changes_no_verdict() -> None:
    about = {"id": "a-1", "type": "qa", "index": 3, "score": 0.5, "ok": True, "note": None, "tags": []}
    turns = [ASKED, ANSWERED | {"weight": 0}, {"role": "tool", "tool_call_id": "call_1", "content": "t"}]
    row = parse_row(0, json.dumps(about | {"messages": turns}).encode())
    assert row.conversation == conversation_from(turns)
    described = parse_row(0, json.dumps({"text": "hello", "source": "wiki", "metadata": {"split": "train"}}).encode())
    assert described.conversation is not None
    assert [part.text for part in parts(described.conversation)] == ["hello", "wiki", "split: train"]
    (verdict,) = judge(WordScorer(), [described.conversation])
    assert verdict.decision is Decision.ALLOW


def test_the_id_is_of_the_content_and_surrogates_are_replaced() -> None:
    messages = [{"role": "user", "content": "a\ud800b"}]
    row = parse_row(0, json.dumps({"messages": messages}).encode())
    assert row.id == row_id(conversation_from(messages))
    assert row.conversation is not None
    assert row.conversation[0].content == "a?b"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_lines_do_not_depend_on_how_the_body_is_cut(size: int) -> None:
    body = b"one\n\ntwo\r\n" + b"x" * 20 + b"\n" + b"y" * 10 + b"\nlast"

    async def chunks() -> AsyncIterator[bytes]:
        for start in range(0, len(body), size):
            yield body[start : start + size]

    async def collected() -> list[bytes | None]:
        return [line async for line in lines(chunks(), max_bytes=10)]

    assert asyncio.run(collected()) == [b"one", b"", b"two\r", None, b"y" * 10, b"last"]


def test_numbers_in_lists_and_objects_are_not_text() -> None:
    row = {"prompt": "hello", "completion": "ok", "input_ids": [1, 2, 3], "usage": {"tokens": 5, "by": "me"}}
    found = parse_row(0, json.dumps(row).encode()).conversation
    assert found is not None
    assert [turn.content for turn in found[2:]] == ["by: me"]
