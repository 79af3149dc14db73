"""Row formats: detection, ambiguity and the conversation inside a row."""

import json

import pytest

from reft_ray.core.conversation import chat, parts
from reft_ray.core.errors import UsageError
from reft_ray.core.scoring import judge
from reft_ray.core.verdict import Decision
from reft_ray.rows.format import Format, detect, rename_columns
from reft_ray.rows.layout import conversation_of, judged_text
from reft_ray.rows.text import conversation_from, full_conversation, messages_json
from reft_ray.testbed.word_scorer import WordScorer

TURNS = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]

ROWS = {
    Format.CHAT: {"messages": TURNS},
    Format.COMPLETION: {"prompt": "Q", "completion": "A"},
    Format.RESPONSE: {"prompt": "Q", "response": "A", "source": "web"},
    Format.ALPACA: {"instruction": "Q", "input": "", "output": "A"},
    Format.SHAREGPT: {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    Format.PREFERENCE: {
        "input": {"messages": TURNS[:1]},
        "preferred_output": TURNS[1:],
        "non_preferred_output": [{"role": "assistant", "content": "B"}],
    },
}


@pytest.mark.parametrize("fmt", ROWS)
def test_each_format_is_detected_and_holds_the_same_conversation(fmt):
    assert detect([ROWS[fmt]], "f") is fmt
    assert spoken(ROWS[fmt], fmt) == [("user", "Q"), ("assistant", "A")]


def spoken(row, fmt):
    return [(turn.role, turn.content) for turn in conversation_of(row, fmt)]


def test_a_message_about_columns_is_one_printable_line():
    with pytest.raises(UsageError) as refused:
        detect([{"a\0b": 1, "c\nd": 2, "schön": 3}], "f")
    assert r"the columns are 'a\x00b', 'c\nd', schön;" in str(refused.value)
    assert str(refused.value).isprintable()


def test_chosen_and_rejected_are_a_preference_pair_with_or_without_the_prompt():
    plain = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    whole = {"prompt": "Q", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "B"}]}
    assert detect([plain, whole], "f") is Format.PREFERENCE
    for row in (plain, whole):
        assert spoken(row, Format.PREFERENCE) == [("user", "Q"), ("assistant", "A")]


def test_the_answer_not_preferred_is_screened_too():
    texts = [turn.content for turn in judged_text(ROWS[Format.PREFERENCE], Format.PREFERENCE)]
    assert texts == ["Q", "A", "B"]


def test_alpaca_with_input_system_and_history():
    row = {"instruction": "Sum", "input": "1 2", "output": "3", "system": "S", "history": [["q", "a"]]}
    roles = [(turn.role, turn.content) for turn in conversation_of(row, Format.ALPACA)]
    assert roles == [
        ("system", "S"),
        ("user", "q"),
        ("assistant", "a"),
        ("user", "Sum\n\n1 2"),
        ("assistant", "3"),
    ]


def test_tool_calls_and_tool_definitions_are_screened():
    call = {"role": "assistant", "tool_calls": [{"function": {"name": "run", "arguments": "make a bomb"}}]}
    row = {"messages": [TURNS[0], call], "tools": [{"function": {"description": "poison"}}]}
    turns = judged_text(row, Format.CHAT)
    assert [(part.name, part.text) for part in parts(turns)][1:] == [
        ("messages[1].assistant.tool_calls[0]", "name: run\narguments: make a bomb"),
        ("messages[2].tool", "description: poison"),
    ]
    assert not turns[2].trained
    assert conversation_from(json.loads(messages_json(turns))) == turns


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ([{"messages": TURNS, "conversations": []}], ("chat", "sharegpt")),
        ([ROWS[Format.COMPLETION] | ROWS[Format.ALPACA]], ("alpaca", "completion")),
        ([ROWS[Format.CHAT], ROWS[Format.ALPACA]], ("chat", "alpaca")),
    ],
)
def test_ambiguous_rows_are_refused_with_both_readings(rows, named):
    with pytest.raises(UsageError) as refused:
        detect(rows, "mixed.jsonl")
    assert all(word in str(refused.value) for word in (*named, "mixed.jsonl", "--format"))


def test_unknown_columns_name_the_remedy():
    with pytest.raises(UsageError, match=r"answer, question.*--column"):
        detect([{"question": "Q", "answer": "A"}], "f")


def test_column_mapping_makes_any_pair_readable():
    row = rename_columns(
        {"question": "Q", "answer": "A", "prompt": "other"}, {"prompt": "question", "response": "answer"}
    )
    assert detect([row], "f") is Format.RESPONSE
    assert conversation_of(row, Format.RESPONSE) == chat("Q", "A")


def test_messages_json_round_trips_the_weight():
    turns = conversation_from([TURNS[0], TURNS[1] | {"weight": 0}])
    assert conversation_from(json.loads(messages_json(turns))) == turns


def test_tool_definitions_of_a_preference_row_are_screened():
    row = {
        "input": {
            "messages": [{"role": "user", "content": "hello"}],
            "tools": [{"type": "function", "function": {"name": "act", "description": "how to build a bomb"}}],
        },
        "preferred_output": [{"role": "assistant", "content": "hi"}],
        "non_preferred_output": [{"role": "assistant", "content": "no"}],
    }
    assert "bomb" in judged_text(row, Format.PREFERENCE)[-1].content


BAD = "how to build a bomb"


@pytest.mark.parametrize(
    ("fmt", "row", "part"),
    [
        (Format.CHAT, {"messages": [TURNS[0], TURNS[1] | {"refusal": BAD}]}, "messages[1].assistant.refusal"),
        (Format.CHAT, {"messages": [TURNS[0] | {"name": BAD}, TURNS[1]]}, "messages[0].user.name"),
        (
            Format.CHAT,
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q", "note": BAD}]}, TURNS[1]]},
            "messages[0].user.note",
        ),
        (Format.CHAT, {"messages": TURNS, "prompt": BAD, "completion": "A"}, "messages[2].tool"),
        (Format.CHAT, {"messages": TURNS, "completion": BAD}, "messages[2].assistant"),
        (Format.CHAT, {"messages": TURNS, "text": BAD}, "messages[2].tool"),
        (Format.COMPLETION, ROWS[Format.COMPLETION] | {"tools": [{"description": BAD}]}, "messages[2].tool"),
        (Format.RESPONSE, ROWS[Format.RESPONSE] | {"functions": BAD}, "messages[2].tool"),
        (Format.RESPONSE, ROWS[Format.RESPONSE] | {"completion": BAD}, "messages[2].assistant"),
        (Format.ALPACA, ROWS[Format.ALPACA] | {"text": BAD}, "messages[2].tool"),
        (Format.SHAREGPT, ROWS[Format.SHAREGPT] | {"tools": BAD}, "messages[2].tool"),
        (
            Format.SHAREGPT,
            {"conversations": [{"from": "human", "value": "Q", "thought": BAD}, {"from": "gpt", "value": "A"}]},
            "messages[0].user.thought",
        ),
        (Format.PREFERENCE, {"prompt": "Q", "chosen": "A", "rejected": "B", "tools": BAD}, "messages[3].tool"),
        (Format.PREFERENCE, {"prompt": BAD, "chosen": TURNS, "rejected": TURNS}, "messages[4].user"),
        (
            Format.PREFERENCE,
            {"prompt": [{"role": "user", "content": BAD}], "chosen": TURNS, "rejected": TURNS},
            "messages[4].user",
        ),
        (Format.PREFERENCE, {"prompt": "Q", "chosen": "A", "rejected": "B", "input": BAD}, "messages[3].tool"),
        (Format.PREFERENCE, ROWS[Format.PREFERENCE] | {"prompt": BAD}, "messages[3].tool"),
        (
            Format.PREFERENCE,
            ROWS[Format.PREFERENCE] | {"input": {"messages": TURNS[:1], "note": BAD}},
            "messages[3].tool",
        ),
        (Format.PROMPT, {"prompt": "Q", "response": BAD}, "messages[1].assistant"),
    ],
)
def test_text_that_another_trainer_would_read_is_judged(fmt, row, part):
    screened = judged_text(row, fmt)
    (verdict,) = judge(WordScorer(), [screened])
    assert (verdict.decision, verdict.part) == (Decision.BLOCK, part)
    assert all(BAD not in turn.content for turn in conversation_of(row, fmt))
    # Sent to a service or read back for the report, it is the same text under the same name.
    read_back = full_conversation(json.loads(messages_json(screened)))
    assert [(found.name, found.text) for found in parts(read_back)] == [
        (found.name, found.text) for found in parts(screened)
    ]


def test_what_describes_a_row_or_repeats_its_prompt_is_not_judged_again():
    row = {"messages": TURNS, "prompt": "Q", "source": "web", "id": "a b", "label": BAD}
    assert judged_text(row, Format.CHAT) == chat("Q", "A")
    whole = {"prompt": "Q", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "B"}]}
    assert [turn.content for turn in judged_text(whole, Format.PREFERENCE)] == ["Q", "A", "Q", "B"]


def test_an_answer_with_the_same_text_does_not_replace_a_prompt():
    row = {"messages": [TURNS[0], {"role": "assistant", "content": BAD}], "prompt": BAD}
    assert [turn.role for turn in judged_text(row, Format.CHAT)] == ["user", "assistant", "tool"]


@pytest.mark.parametrize("key", ["role", "content", "weight", "tool_calls", "id", "function_call", "note"])
def test_no_text_is_lost_on_the_way_to_a_service(key):
    texts = [{"text": "Q", key: BAD}, {"text": "Q", key: {"index": [BAD + " " + key]}}]
    turns = full_conversation([{"role": "user", "content": texts}])
    read_back = full_conversation(json.loads(messages_json(turns)))
    assert sorted(part.text for part in parts(read_back)) == sorted(part.text for part in parts(turns))
    assert sum(BAD in part.text for part in parts(read_back)) == 2
