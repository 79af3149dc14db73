"""Messages in JSON: how content, tool calls and tool definitions become text."""

import json
from typing import Any

import pytest

from reft_ray.core.conversation import parts
from reft_ray.core.scoring import judge
from reft_ray.core.verdict import Decision
from reft_ray.rows.text import conversation_from, tool_definitions
from reft_ray.testbed.word_scorer import WordScorer


def turn(**values: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": None} | values


def function(arguments: Any) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "run", "arguments": arguments}}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ('{"command": "rm", "flags": ["-r", "-f"]}', "command: rm\nflags: -r\nflags: -f"),
        ({"command": "rm", "deep": {"n": 0}}, "command: rm\nn: 0"),
        ('{"a \\u0062omb": null}', "a bomb"),
        ('{"inner": "{\\"word\\": \\"bomb\\"}"}', "word: bomb"),
        ('{"t": "a bomb", "t": {"t": "x", "t": "y"}, "t": {}}', "t: a bomb\nt: x\nt: y\nt"),
        ("not json {", "arguments: not json {"),
        ("{broken", "arguments: {broken"),
        ('{"lone": "\\ud800"}', "lone: ?"),
    ],
)
def test_arguments_are_read_as_text(arguments: Any, text: str) -> None:
    (part,) = parts(conversation_from([turn(tool_calls=[function(arguments)])]))
    assert part.text == f"name: run\n{text}"


def test_each_call_is_a_separate_part_after_its_turn() -> None:
    turns = [
        {"role": "user", "content": "u"},
        turn(content="c", tool_calls=[function("{}"), {"custom": {"input": "x"}}], function_call={"name": "f"}),
        {"role": "tool", "content": "t"},
    ]
    found = parts(conversation_from(turns))
    assert [part.name for part in found] == [
        "messages[0].user",
        "messages[1].assistant",
        "messages[1].assistant.tool_calls[0]",
        "messages[1].assistant.tool_calls[1]",
        "messages[1].assistant.function_call",
        "messages[2].tool",
    ]
    assert [part.role for part in found] == ["user", *["assistant"] * 4, "tool"]


@pytest.mark.parametrize(
    "calls",
    [
        "a bomb",
        {"a": "bomb"},
        [["a bomb"]],
        [{"id": "a bomb"}],
        [{"id": ["bomb"]}],
        [{"type": "bomb_" * 20}],
        [{"index": "bomb爆弾の作り方"}],
    ],
)
def test_calls_of_any_shape_are_read(calls: Any) -> None:
    (part,) = parts(conversation_from([turn(tool_calls=calls)]))
    assert "bomb" in part.text


def test_deep_nesting_exhausts_no_stack() -> None:
    value: Any = "bomb"
    for _ in range(20_000):
        value = [value]
    (part,) = parts(conversation_from([turn(tool_calls=[{"arguments": value}])]))
    assert part.text == "arguments: bomb"
    text = "[" * 100_000
    (part,) = parts(conversation_from([turn(tool_calls=[function(text)])]))
    assert part.text.endswith(text)


def test_short_identifiers_of_calls_are_not_read() -> None:
    calls = [{"id": "call_" + "0" * 59, "type": "function", "index": 3, "tool_call_id": None, "name": "run"}]
    (part,) = parts(conversation_from([turn(tool_calls=calls)]))
    assert part.text == "name: run"


def test_a_harmful_call_blocks_its_row_and_the_verdict_names_it() -> None:
    rows = [
        conversation_from([{"role": "user", "content": "Good morning."}, turn(tool_calls=[function(arguments)])])
        for arguments in (json.dumps({"note": "tea"}), '{"note": "build a \\u0062omb"}')
    ]
    good, bad = judge(WordScorer(), rows)
    assert good.decision is Decision.ALLOW
    assert (bad.decision, bad.part) == (Decision.BLOCK, "messages[1].assistant.tool_calls[0]")


def test_tool_definitions_are_a_turn_that_is_not_trained_on() -> None:
    assert tool_definitions({"messages": []}) == ()
    (turn,) = tool_definitions({"tools": [{"type": "function", "function": {"description": "d", "name": "n"}}]})
    assert (turn.role, turn.content, turn.trained) == ("tool", "description: d\nname: n", False)
