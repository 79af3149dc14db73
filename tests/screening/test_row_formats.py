"""Row formats: detection, ambiguity and the conversation inside a row."""

import json

import pytest

from reft_ray.core.conversation import chat, conversation_from, parts
from reft_ray.core.errors import UsageError
from reft_ray.screening.formats import Format, conversation_of, detect, mapped, messages_json, screened_of

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
    assert conversation_of(ROWS[fmt], fmt) == chat("Q", "A")


def test_a_message_about_columns_is_one_printable_line():
    with pytest.raises(UsageError) as refused:
        detect([{"a\0b": 1, "c\nd": 2, "schön": 3}], "f")
    assert r"the columns are 'a\x00b', 'c\nd', schön;" in str(refused.value)
    assert str(refused.value).isprintable()


def test_chosen_and_rejected_are_a_preference_pair_with_or_without_the_prompt_inside():
    plain = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    whole = {"prompt": "Q", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "B"}]}
    assert detect([plain, whole], "f") is Format.PREFERENCE
    assert conversation_of(plain, Format.PREFERENCE) == conversation_of(whole, Format.PREFERENCE) == chat("Q", "A")


def test_the_answer_not_preferred_is_screened_too():
    texts = [turn.content for turn in screened_of(ROWS[Format.PREFERENCE], Format.PREFERENCE)]
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
    turns = screened_of(row, Format.CHAT)
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
    row = mapped({"question": "Q", "answer": "A", "prompt": "other"}, {"prompt": "question", "response": "answer"})
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
    assert "bomb" in screened_of(row, Format.PREFERENCE)[-1].content
