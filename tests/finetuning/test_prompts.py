import json
from pathlib import Path

import pytest

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.prompts import hold_out_rows, hold_out_sources, join_answers, read_labelled, without_prompts_of


def file_of(folder: Path, *lines: object) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_prompts_and_messages_are_read_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        "\ufeff" + json.dumps({"prompt": "a", "label": "harmful", "source": "s"}),
        {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "c"}], "label": "harmless"},
        "",
    )
    assert read_labelled(path) == [
        Example(chat("a"), Label.HARMFUL, "s"),
        Example(chat("b", "c"), Label.HARMLESS, ""),
    ]


def test_every_problem_has_its_file_and_line(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        {"prompt": "fine", "label": "harmful"},
        "{not json",
        {"prompt": "x", "label": "evil"},
        {"prompt": "   ", "label": "harmful"},
        {"messages": [{"role": "wizard", "content": "x"}], "label": "harmful"},
        [1],
        {"prompt": 3, "label": "harmless"},
    )
    with pytest.raises(ReftError) as caught:
        read_labelled(path)
    message = str(caught.value)
    assert f"{path}:2: not valid JSON at column 2: " in message
    assert f"{path}:3: label must be harmful or harmless, not 'evil'" in message
    assert f"{path}:4: the prompt is empty" in message
    assert f"{path}:5: messages[0].role: wizard is not a role" in message
    assert f"{path}:6: the line is a JSON array, not a dictionary" in message
    assert message.endswith("(and 1 more)")
    assert "\n" not in message


def test_an_empty_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ReftError, match="has no rows"):
        read_labelled(file_of(tmp_path, ""))


def test_answers_join_their_prompts_of_the_same_label_and_others_are_returned_separately() -> None:
    prompts = [Example(chat("a"), Label.HARMFUL), Example(chat("b"), Label.HARMLESS)]
    answers = [
        Example(chat("a", "sorry"), Label.HARMFUL),
        Example(chat("a", "never"), Label.HARMFUL),
        Example(chat("b", "sorry"), Label.HARMFUL),
        Example(chat("c", "sure"), Label.HARMLESS),
    ]
    joined, others = join_answers(prompts, answers)
    assert [(row.prompt[0].content, row.response) for row in joined] == [("a", "sorry"), ("b", "")]
    assert [(row.prompt[0].content, row.response) for row in others] == [("c", "sure")]


def test_whole_sources_are_held_out() -> None:
    rows = [Example(chat(str(i)), Label.HARMFUL, "xy"[i % 2]) for i in range(40)]
    train, held = hold_out_sources(rows, ["y"])
    assert {row.source for row in train} == {"x"}
    assert len(train) == len(held) == 20
    with pytest.raises(ReftError, match="no row has source 'z'; there are x, y"):
        hold_out_sources(rows, ["z"])
    mixed = rows + [Example(chat(f"c{i}"), Label.HARMLESS) for i in range(20)]
    train, held = hold_out_rows(mixed)
    assert (len(train), len(held)) == (54, 6)
    assert {row.label for row in held} == set(Label)
    assert hold_out_rows(mixed)[1] == held


def test_all_rows_of_a_prompt_are_held_out_together() -> None:
    rows = [Example(chat(f"harmful {i % 10}", str(i)), Label.HARMFUL) for i in range(60)]
    rows += [Example(chat(f"harmless {i}"), Label.HARMLESS) for i in range(20)]
    rows += [Example(chat(f"harmful {i}"), Label.HARMLESS) for i in range(10)]
    train, held = hold_out_rows(rows)
    asked = [{row.prompt[0].content for row in part} for part in (train, held)]
    assert not asked[0] & asked[1]
    assert len(train) + len(held) == len(rows)
    # A tenth of the prompts of each label, not of the rows.
    assert 1 <= sum(prompt.startswith("harmful") for prompt in asked[1]) <= 4
    assert {row.label for row in train} == set(Label)


def test_answers_to_validation_prompts_are_left_out() -> None:
    held = [Example(chat("held"), Label.HARMFUL)]
    answers = [Example(chat("held", "sorry"), Label.HARMFUL), Example(chat("free", "sorry"), Label.HARMFUL)]
    assert without_prompts_of(answers, held) == answers[1:]


def test_rows_are_read_as_screening_reads_them(tmp_path: Path) -> None:
    path = file_of(
        tmp_path,
        {"text": "a"},
        {"instruction": "b", "output": "c"},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "d"}]}]},
    )
    assert [row.messages for row in read_labelled(path, Label.HARMLESS)] == [chat("a"), chat("b", "c"), chat("d")]
    for line in ('{"prompt": "a", "prompt": "b"}', {"prompt": "a", "images": ["x"]}):
        with pytest.raises(ReftError, match=r":1: .*(key twice|only text can be screened)"):
            read_labelled(file_of(tmp_path, line), Label.HARMLESS)
