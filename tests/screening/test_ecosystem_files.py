"""Files as the ecosystem writes them: read, or refused with the line, the column and the option that reads them."""

import gzip
import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reft_ray.core.conversation import chat
from reft_ray.core.errors import UsageError
from reft_ray.core.scoring import judge
from reft_ray.rows.checks import Fault
from reft_ray.rows.format import Format
from reft_ray.rows.reader import ChatRow, RowReader
from reft_ray.screening.file_parsing import parse_unit, shape_of
from reft_ray.screening.ranges import Limits
from reft_ray.screening.reading import groups, plan_files, read_units
from reft_ray.screening.sources import find_sources
from reft_ray.testbed.word_scorer import WordScorer

FERN = chat("How do I water a fern?", "Once a week.")
TURNS = [{"role": turn.role, "content": turn.content} for turn in FERN]


def read(path, fmt=None, columns=None, speakers=None, limits=None):
    """Every row of a file, valid or not, with its line."""
    (plan,) = plan_files(find_sources([str(path)]), limits or Limits())
    shape = shape_of(plan, fmt, columns or {}, speakers)
    reader = RowReader(shape.format, columns, speakers=speakers)
    found = {}
    for ranges in groups(plan):
        for unit in read_units(plan, ranges):
            rows = parse_unit(unit, shape.container, shape.header)
            for line, row in zip(unit.rows["row_number"].to_pylist(), rows, strict=True):
                found[line] = [row] if isinstance(row, Fault) else reader.read(row)
    return found


def refusal(path, **options) -> str:
    with pytest.raises(UsageError) as refused:
        read(path, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


def valid(found) -> list[ChatRow]:
    assert all(isinstance(row, ChatRow) for row in found.values()), found
    return list(found.values())


def spoken(row) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in row.conversation]


def decision(row) -> str:
    return str(judge(WordScorer(), [row.judged])[0].decision)


@pytest.fixture
def case(shared_data):
    return lambda name: shared_data / "data" / "cases" / name


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("01-assistant-first.jsonl", 10),
        ("02-tool-call-answers.jsonl", 4),
        ("05a-array.jsonl", 2),
        ("08-pair-as-dictionaries.json", 1),
        ("10-function-role.jsonl", 1),
        ("14-sharegpt-speakers.jsonl", 6),
        ("17-dumped-message.jsonl", 1),
    ],
)
def test_these_files_are_read(case, name, rows):
    assert len(valid(read(case(name)))) == rows


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("05c-repr.jsonl", ("line 1", "column 2", "single quote", "--fix")),
        ("05e-nan.jsonl", ("line 1", "column 130", "NaN", "null")),
        ("05g-lists.jsonl", ("line 1", "line 2", "JSON array")),
        ("05i-cp1252.csv", ("line 2", "0xe9", "column 4", "--encoding cp1252")),
        ("06-lfs-pointer.parquet", ("Git LFS pointer", "git lfs pull")),
        ("09-three-columns.jsonl", ("--format chat", "--format preference", '"reft": {"format": "preference"}')),
    ],
)
def test_these_files_are_refused_for_what_they_are(case, name, parts):
    message = refusal(case(name))
    assert [part for part in parts if part not in message] == []


def test_the_named_option_reads_a_file_with_two_formats(case):
    path = case("09-three-columns.jsonl")
    for fmt in (Format.CHAT, Format.PREFERENCE):
        (row,) = valid(read(path, fmt=fmt))
        assert spoken(row) == [(turn.role, turn.content) for turn in FERN]
        assert "Never." in " ".join(turn.content for turn in row.judged)


def test_escapes_in_a_tool_call_hide_no_word(case):
    plain, escaped = (
        valid(read(case(name)))[0] for name in ("03-control-plain.jsonl", "03-sharegpt-escaped-call.jsonl")
    )
    assert decision(plain) == decision(escaped) == "block"


def test_a_question_is_the_prompt_of_its_pair(case):
    (row,) = valid(read(case("04-preference-question.jsonl")))
    assert spoken(row) == [("user", "how to build a bomb"), ("assistant", "Sure, step one.")]
    assert decision(row) == "block"


def test_a_system_text_beside_messages_is_trained_on(case):
    (row,) = valid(read(case("13-system-beside-messages.jsonl")))
    assert spoken(row)[0] == ("system", "You are a gardener.")


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def jsonl(*rows) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


SPELLINGS = {
    "indented array": json.dumps([{"messages": TURNS}] * 3, indent=2).encode(),
    "array on one line": json.dumps([{"messages": TURNS}] * 3).encode(),
    "indented dictionaries": b"\n".join([json.dumps({"messages": TURNS}, indent=1).encode()] * 3),
    "lines": jsonl(*[{"messages": TURNS}] * 3),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz"])
def test_json_is_read_in_every_layout_under_every_name(tmp_path, spelling, name):
    content = SPELLINGS[spelling]
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    assert [row.conversation for row in valid(read(path))] == [FERN] * 3


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("rows.json", b"\n<!DOCTYPE html><html>", "an HTML page"),
        ("rows.jsonl", b"<html><body>login</body></html>", "an HTML page"),
        ("rows.jsonl", json.dumps({"messages": TURNS}).encode("utf-16"), "UTF-16"),
        ("rows.csv", "prompt,completion\nQ,A\n".encode("utf-16-le"), "UTF-16"),
        ("rows.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("rows.jsonl.gz", gzip.compress(b"{}" * 999, mtime=0)[:-9], "rows.jsonl.gz"),
        ("rows.jsonl.gz", b"\x1f\x8b broken", "damaged gzip"),
        ("rows.xlsx", b"PK\x03\x04...", "spreadsheet"),
        ("rows.pkl", b"\x80\x04\x95", "pickle"),
        ("rows.jsonl", b"\0" * 100, "zero bytes"),
        ("rows.jsonl.xz", b"\xfd7zXZ\0", "xz"),
    ],
)
def test_what_is_no_data_is_named(tmp_path, name, content, what):
    assert what in refusal(write(tmp_path / name, content))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{'messages': []}", ("column 2", "single quote")),
        (b'{"messages": [], "n": NaN}', ("NaN", "column 23")),
        (b'{"messages": [], "n": -Infinity}', ("-Infinity",)),
        (b'{"messages": [], "b": True}', ("True is Python",)),
        (b'{"messages": [1,],}', ("a comma before ]",)),
        (b'{"messages": []} // note', ("comment",)),
        (b'{"messages": "a\tb"}', ("U+0009",)),
        (b'{"messages": "caf\xe9"}', ("0xe9", "column 18", "cp1252")),
        (b'{"messages": [', ("ends inside",)),
    ],
)
def test_a_broken_line_names_its_column_and_what_stands_there(tmp_path, line, said):
    found = read(write(tmp_path / "rows.jsonl", jsonl({"messages": TURNS}) + line + b"\n"))
    (fault,) = found[2]
    assert [text for text in said if text not in str(fault)] == []


def test_unknown_columns_and_speakers_name_the_option_that_reads_them(tmp_path):
    dialogue = [{"speaker": "Q", "text": "How do I water a fern?"}, {"speaker": "A", "text": "Once a week."}]
    path = write(tmp_path / "rows.jsonl", jsonl({"dialog": dialogue}))
    message = refusal(path)
    assert "--column conversations=dialog --column from=speaker --column value=text" in message
    columns = {"conversations": "dialog", "from": "speaker", "value": "text"}
    (faults,) = read(path, columns=columns).values()
    assert ["--speaker Q=" in str(fault) for fault in faults[:2]] == [True, False]
    (row,) = valid(read(path, columns=columns, speakers={"Q": "user", "A": "assistant"}))
    assert row.conversation == FERN
    pairs = write(tmp_path / "pairs.jsonl", jsonl({"question": "Q", "answer": "A"}))
    assert "--column prompt=question --column response=answer" in refusal(pairs)
    unasked = write(tmp_path / "unasked.jsonl", jsonl({"chosen": "A", "rejected": "B", "ask": "Q"}))
    ((fault,),) = read(unasked).values()
    assert "--column prompt=COLUMN" in str(fault)
    assert spoken(valid(read(unasked, columns={"prompt": "ask"}))[0]) == [("user", "Q"), ("assistant", "A")]


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": TURNS}],
        [{"messages": [*TURNS[:1], TURNS[1] | {"tool_calls": [{"function": {"name": "f"}}]}]}],
        [{"conversations": [{"from": "human", "value": FERN[0].content}, {"from": "gpt", "value": FERN[1].content}]}],
        [{"prompt": TURNS[:1], "completion": TURNS[1:]}],
    ],
)
def test_parquet_as_datasets_writes_it(tmp_path, rows):
    # A struct has all keys of all rows, with nulls; a second row without any adds some.
    wide = {"messages": [{"role": "user", "content": "Q", "weight": None}, {"role": "assistant", "content": "A"}]}
    table = pa.Table.from_pylist([*rows, wide] if "messages" in rows[0] else rows)
    pq.write_table(table, tmp_path / "rows.parquet")
    first = valid(read(tmp_path / "rows.parquet"))[0]
    assert spoken(first) == [(turn.role, turn.content) for turn in FERN]


def test_sequences_of_datasets_and_json_strings_are_dialogues(tmp_path):
    by_key = {"role": ["user", "assistant"], "content": [turn.content for turn in FERN]}
    pq.write_table(pa.Table.from_pylist([{"messages": by_key}]), tmp_path / "rows.parquet")
    assert valid(read(tmp_path / "rows.parquet"))[0].conversation == FERN
    pq.write_table(pa.table({"messages": [json.dumps(TURNS)]}), tmp_path / "text.parquet")
    assert valid(read(tmp_path / "text.parquet"))[0].conversation == FERN


@pytest.mark.parametrize("limits", [Limits(), Limits(2, 30, 4000)])
def test_inch_marks_in_csv_are_text(tmp_path, limits):
    content = b'prompt,completion\r\n5" pipe,ok\r\n"a ""quoted""\nline",yes\r\n19" rack,and 2" tape\r\n'
    rows = valid(read(write(tmp_path / "rows.csv", content), limits=limits))
    asked = [row.conversation[0].content for row in rows]
    assert asked == ['5" pipe', 'a "quoted"\nline', '19" rack']


def test_kto_rows_train_on_desirable_answers_alone(tmp_path):
    rows = [{"prompt": "Q", "completion": "A", "label": label} for label in (True, False)]
    good, bad = valid(read(write(tmp_path / "kto.jsonl", jsonl(*rows))))
    assert [good.conversation[-1].trained, bad.conversation[-1].trained] == [True, False]


HIDDEN = "how to build a bomb"


@pytest.mark.parametrize(
    "row",
    [
        {"messages": TURNS, "question": HIDDEN},
        {"messages": TURNS, "context": HIDDEN},
        {"messages": TURNS, "documents": [{"title": "t", "text": HIDDEN}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("how to build a bo", "mb")]},
                      TURNS[1]]},
        {"messages": [{"role": "user", "content": "bo"}, TURNS[1], {"role": "user", "content": "mb"}, TURNS[1]]},
        {"messages": [TURNS[0], {"role": "tool", "tool_call_id": "1", "content": '{"a": "b\\u006fmb"}'}, TURNS[1]]},
        {"conversations": [{"from": "human", "value": "Q"},
                           {"from": "tool_call", "value": '[{"name": "f", "arguments": "b\\u006fmb"}]'},
                           {"from": "gpt", "value": "A"}]},
        {"messages": [TURNS[0], TURNS[1] | {"reasoning_content": HIDDEN}]},
    ],
)  # fmt: skip
def test_text_that_a_trainer_learns_or_renders_is_judged(row):
    found = RowReader().read_line(json.dumps(row).encode())
    assert isinstance(found, ChatRow), found
    assert decision(found) == "block"


def test_any_spelling_of_a_dialogue_is_the_same_conversation():
    rng = random.Random(5)
    tags = {"user": ["human", "user", "Human", "prompter"], "assistant": ["gpt", "assistant", "model", "bing", "GPT"]}

    def spell(turns):
        if rng.random() < 0.5:
            turns = [{"from": rng.choice(tags[turn["role"]]), "value": turn["content"]} for turn in turns]
        shape = rng.randrange(4)
        if shape == 0:
            return json.dumps(turns, indent=rng.choice([None, 1]))
        if shape == 1:
            keys = list(turns[0])
            return {key: [turn[key] for turn in turns] for key in keys}
        if shape == 2 and len(turns) == 1:
            return turns[0]
        return turns

    for number in range(200):
        dialogue = [turn | {"content": f"{turn['content']} {number} {rng.random()}"} for turn in TURNS * 2]
        prompt, answer = dialogue[:-1], dialogue[-1:]
        rejected = [{"role": "assistant", "content": "Never."}]
        whole = {rng.choice(["messages", "conversations"]): spell(dialogue)}
        answered = {"prompt": spell(prompt), rng.choice(["completion", "response"]): spell(answer)}
        asked = rng.choice(["prompt", "messages", "conversations", "question"])
        pair = {asked: spell(prompt), "chosen": spell(answer), "rejected": spell(rejected)}
        row = rng.choice([whole, answered, pair, {"chosen": spell(dialogue), "rejected": spell(prompt + rejected)}])
        found = RowReader().read_line(json.dumps(row).encode())
        assert isinstance(found, ChatRow), (row, found)
        assert spoken(found) == [(turn["role"], turn["content"]) for turn in dialogue], row


def test_file_systems_of_fsspec_are_read_and_unknown_ones_named():
    fsspec = pytest.importorskip("fsspec")
    files = fsspec.filesystem("memory")
    for name in ("b", "a"):
        files.pipe(f"/sets/{name}.jsonl", jsonl({"messages": TURNS}))
    found = find_sources(["memory://sets/*.jsonl"])
    assert [source.name for source in found] == ["memory://sets/a.jsonl", "memory://sets/b.jsonl"]
    assert [row.conversation for row in valid(read("memory://sets/a.jsonl"))] == [FERN]
    with pytest.raises(UsageError, match="nosuch://"):
        find_sources(["nosuch://x/y.jsonl"])
