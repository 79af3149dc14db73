"""The reader of rows: every error with its line, path and code; nothing valid is refused."""

import json

import pytest

from reft_ray.core.conversation import chat
from reft_ray.core.errors import UsageError
from reft_ray.rows.format import Format
from reft_ray.rows.reader import ChatRow, RowReader, control_tokens_of, validate

USER = {"role": "user", "content": "Q"}
ANSWER = {"role": "assistant", "content": "A"}


def lines(*rows: object) -> bytes:
    return b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows)


def found(raw: bytes, **options: object) -> list[tuple[int, str, str]]:
    return [(problem.line, problem.path, problem.code) for problem in validate(raw, **options)]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ([1], [("", "data_type")]),
        (b"{broken", [("", "invalid_json")]),
        (b'{"messages": "\xff"}', [("", "invalid_utf8")]),
        ({"messages": []}, [("messages", "missing_messages_list")]),
        ({"other": 1}, [("messages", "missing_messages_list")]),
        ({"messages": [USER, "text", ANSWER]}, [("messages[1]", "data_type")]),
        ({"messages": [{"content": "Q"}, ANSWER]}, [("messages[0]", "message_missing_key")]),
        ({"messages": [{"role": "user"}, ANSWER]}, [("messages[0]", "message_missing_key")]),
        ({"messages": [USER | {"colour": 1}, ANSWER]}, [("messages[0].colour", "message_unrecognized_key")]),
        ({"messages": [USER | {"weight": 1}, ANSWER]}, [("messages[0].weight", "message_unrecognized_key")]),
        ({"messages": [USER | {"role": "narrator"}, ANSWER]}, [("messages[0].role", "unrecognized_role")]),
        ({"messages": [USER | {"content": ""}, ANSWER]}, [("messages[0].content", "missing_content")]),
        ({"messages": [USER | {"content": 7}, ANSWER]}, [("messages[0].content", "missing_content")]),
        ({"messages": [USER, ANSWER | {"weight": 0.5}]}, [("messages[1].weight", "invalid_weight")]),
        ({"messages": [USER]}, [("messages", "example_missing_assistant_message")]),
        (
            {"messages": [USER | {"content": [{"type": "image_url"}]}, ANSWER]},
            [("messages[0].content[0]", "unsupported_content")],
        ),
        ({"messages": [USER, {"role": "tool", "content": "x"}, ANSWER]}, [("messages[1]", "message_missing_key")]),
    ],
)
def test_chat_errors_carry_their_code_and_path(row, expected):
    assert found(lines(row), fmt=Format.CHAT) == [(1, *item) for item in expected]


def test_every_error_is_reported_with_its_line():
    raw = lines({"messages": [USER, ANSWER]}, b"", b"nope", {"messages": [{"role": "x"}, {"content": ""}]})
    assert found(raw) == [
        (3, "", "invalid_json"),
        (4, "messages[0].role", "unrecognized_role"),
        (4, "messages[0]", "message_missing_key"),
        (4, "messages[1]", "message_missing_key"),
        (4, "messages[1].content", "missing_content"),
        (4, "messages", "example_missing_assistant_message"),
    ]


@pytest.mark.parametrize(
    ("fmt", "row", "code"),
    [
        (Format.COMPLETION, {"prompt": "Q"}, "missing_field"),
        (Format.RESPONSE, {"prompt": "Q", "response": 3}, "data_type"),
        (Format.ALPACA, {"instruction": "", "output": "A"}, "missing_content"),
        (Format.ALPACA, {"instruction": "Q", "output": "A", "history": ["q"]}, "data_type"),
        (Format.SHAREGPT, {"conversations": [{"from": "alien", "value": "x"}]}, "unrecognized_role"),
        (Format.SHAREGPT, {"conversations": [{"from": "human", "value": "x"}]}, "example_missing_assistant_message"),
        (Format.PREFERENCE, {"prompt": "Q", "chosen": "A"}, "missing_field"),
        (
            Format.PREFERENCE,
            {"input": {}, "preferred_output": "A", "non_preferred_output": "B"},
            "missing_messages_list",
        ),
        (Format.PROMPT, {"text": "Q"}, "missing_field"),
        (Format.PROMPT, {"prompt": "Q", "images": ["a.png"]}, "unsupported_content"),
        (Format.CHAT, {"messages": [USER, ANSWER], "audio": {"path": "a.wav"}}, "unsupported_content"),
        (Format.CHAT, {"messages": [USER | {"content": [{"text": "Q", "image": "x"}]}, ANSWER]}, "unsupported_content"),
        (Format.SHAREGPT, {"conversations": [{"from": "gpt", "value": "x", "video": "y"}]}, "unsupported_content"),
        (
            Format.PREFERENCE,
            {"input": {"messages": [USER], "images": "x"}, "preferred_output": "A", "non_preferred_output": "B"},
            "unsupported_content",
        ),
    ],
)
def test_other_formats_are_checked(fmt, row, code):
    assert code in [code for _, _, code in found(lines(row), fmt=fmt)]


def test_valid_rows_of_every_kind_pass():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    tool = {"role": "tool", "content": "x", "tool_call_id": "1"}
    text_parts = USER | {"content": [{"type": "text", "text": "Q"}, {"text": "Q"}]}
    no_media = {"images": [], "audio": None, "videos": ""}
    raw = lines({"messages": [USER, call, tool, ANSWER | {"weight": 0}]}, {"messages": [text_parts, ANSWER]} | no_media)
    assert validate(b"\xef\xbb\xbf" + raw.replace(b"\n", b"\r\n")) == []


@pytest.mark.parametrize("written", ["<|im_start|>", "\\u003c|im_start|>", "<\\/s>"])
def test_control_tokens_are_found_in_any_json_escape(written):
    raw = b'{"messages":[{"role":"user","content":"a %s b"},{"role":"assistant","content":"A"}]}' % written.encode()
    assert found(raw, control_tokens={"<|im_start|>", "</s>"}) == [(1, "messages[0].content", "control_token")]
    assert found(raw, control_tokens={"<|eot_id|>"}) == []


def chat_with(extra: str) -> bytes:
    return lines({"messages": [USER, ANSWER]})[:-1] + b"," + extra.encode() + b"}"


@pytest.mark.parametrize(
    "extra",
    [
        '"messages": []',
        '"meta": {"k": 1, "k": 2}',
        '"meta": {"k": 1, "\\u006b": 2}',
        '"meta": {"k": 1, "k": "\\u0022\\u0022"}',
        '"meta": {"k\\u0022": 1, "k\\u0022": 2}',
        '"meta": ' + "[" * 600 + '{"k": 1, "k": 2}' + "]" * 600,
    ],
)
def test_a_repeated_key_makes_its_row_invalid(extra):
    assert found(chat_with(extra), fmt=Format.CHAT) == [(1, "", "ambiguous_keys")]


@pytest.mark.parametrize(
    "extra",
    [
        '"meta": {"k": "k", "l": {"k": "\\"k\\": 1"}}',
        '"meta": {"k" : ["\\u0022k\\u0022:", "\\\\", "a\\\\\\"b\\": "], "": {}}',
        '"meta": ' + "[" * 600 + '{"k": 1, "l": "\\u0022"}' + "]" * 600,
    ],
)
def test_keys_that_occur_once_are_valid_in_any_spelling(extra):
    assert found(chat_with(extra)) == []


def test_too_few_rows_are_an_error_only_with_min_rows():
    raw = lines({"messages": [USER, ANSWER]})
    assert found(raw) == []
    assert found(raw, min_rows=10) == [(1, "", "too_few_examples")]


def test_control_tokens_come_from_tokenizer_json(tmp_path):
    tokens = [{"content": "<s>", "special": True}, {"content": "word", "special": False}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    assert control_tokens_of(tmp_path) == {"<s>"}
    (tmp_path / "tokenizer.json").write_text("[]")
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        control_tokens_of(tmp_path)


def test_a_deeply_nested_row_is_searched_for_control_tokens():
    depth = 1000
    raw = b'{"prompt":"a","response":"b","extra":' + b"[" * depth + b'"<|end|>"' + b"]" * depth + b"}"
    (problem,) = validate(raw, control_tokens=["<|end|>"])
    assert problem.code == "control_token"


def test_a_preference_row_under_two_pairs_of_names_is_refused():
    raw = b'{"prompt":"a","chosen":"b","rejected":"c","preferred_output":5,"input":7}'
    (problem,) = validate(raw, Format.PREFERENCE)
    assert problem.code == "ambiguous_keys"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER | {"refusal": "R", "weight": 0}], "tools": [{"description": "T"}]},
        {"prompt": "Q", "completion": "A", "response": "B"},
        {"instruction": "Q", "output": "A", "history": [["q", "a"]]},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"prompt": "Q", "chosen": "A", "rejected": "B"},
    ],
)
def test_what_is_judged_alone_is_what_a_dataset_trains_on(row):
    alone = RowReader(judging=True).read_line(lines(row))
    assert isinstance(alone, ChatRow)
    in_dataset = RowReader(alone.format).read_line(lines(row))
    assert isinstance(in_dataset, ChatRow)
    assert (in_dataset.conversation, in_dataset.judged) == (alone.conversation, alone.judged)


def test_judging_reads_rows_that_are_not_trained_on():
    judging, training = RowReader(judging=True), RowReader()
    for row, text in (
        ({"text": "Q"}, chat("Q")),
        ({"prompt": "Q", "completion": None}, chat("Q")),
        ({"messages": [USER | {"mood": "good"}]}, chat("Q")),
        (b'{"prompt": "Q\\ud800", "response": ""}', chat("Q?", "")),
    ):
        found = judging.read_line(lines(row))
        assert isinstance(found, ChatRow)
        assert found.conversation == text
        assert isinstance(training.read_line(lines(row)), list)


def test_lone_surrogates_hide_no_repeated_key():
    raw = b'{"prompt": "Q", "\\ud800": "a", "\\ud801": "b"}'
    assert [fault.code for fault in RowReader(judging=True).read_line(raw)] == ["ambiguous_keys"]
    assert [fault.code for fault in RowReader().read_line(raw)] == ["invalid_json"]


@pytest.mark.parametrize("extra", [b'{"messages":[]}', b'{"messages":[{"role":"user","content":"]}', b"{", b'{"a":1}'])
def test_plain_rows_are_known_together_as_one_by_one(extra):
    plain = json.dumps({"messages": [USER, ANSWER]}).encode()
    whole = plain.replace(b'"Q"', b'"a \\" \\\\ ]}"')
    reader = RowReader(Format.CHAT)
    assert reader.are_plain([plain, whole] * 3)
    halves = [plain + b"," + plain, plain[: plain.index(b"}") + 1], plain[plain.index(b"}") + 2 :]]
    for lines_ in ([plain, extra], [plain, plain[:-2] + b',{"role":"user","content":"x","content":"y"}]}'], halves):
        assert not reader.are_plain(lines_)
    assert not RowReader(Format.CHAT, control_tokens=["Q"]).are_plain([plain])
