"""The rows of the packaged teacher: licences, equal shares of sources, answers of whole sentences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.experiments.prepared_teacher import (
    BATCH_ROWS,
    ENGLISH,
    HELD_OUT,
    LOOK_ALIKES,
    OWN,
    ROLES,
    SYNTHETIC,
    teacher_data,
    whole_sentences,
)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    rows = [
        {"prompt": f"{source} {n}", "label": label, "source": source, "licence": licence}
        for source, label, licence, count in (
            ("aart", "harmful", "CC BY 4.0", 40),
            ("advbench", "harmful", "MIT", 5),
            ("dolly", "harmless", "CC BY-SA 3.0", 30),
            ("bought", "harmful", "CC BY-NC 4.0", 30),
            ("catqa", "harmful", "Apache-2.0", 8),
            ("certified_safe", "harmless", "MIT", 8),
        )
        for n in range(count)
    ]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def answer(rows: Sequence[Example]) -> list[Example]:
    return [replace(row, messages=chat(row.prompt[-1].content, "Here you are.")) for row in rows]


def test_sources_of_a_label_have_equal_shares_and_every_row_an_answer(prompts: Path) -> None:
    data = teacher_data(prompts, answer, steps=6)
    each = 6 * BATCH_ROWS // 2
    assert Counter((row.label, row.source) for row in data.train) == {
        **{
            (Label.HARMFUL, source): each // 6
            for source in ("aart", "advbench", SYNTHETIC, ENGLISH, LOOK_ALIKES, ROLES)
        },
        **{(Label.HARMLESS, source): each // 8 for source in ("dolly", *OWN)},
    }
    assert all(row.answered for row in data.train)
    assert {row.source for row in data.validation} == {"catqa", "certified_safe", HELD_OUT}


def test_rows_under_other_licences_are_in_no_part_and_not_on_the_card(prompts: Path) -> None:
    data = teacher_data(prompts, answer, steps=2)
    named = {source["source"]: source for source in data.card_sources}
    assert "bought" not in named
    assert (named["aart"]["prompts"], named["aart"]["use"]) == (40, "training")
    assert (named["catqa"]["licence"], named["catqa"]["use"]) == ("Apache-2.0", "validation")


@pytest.mark.parametrize(
    ("text", "kept"),
    [("One. Two? Thr", "One. Two?"), ("no end", ""), ("Wait! ", "Wait!"), ("", "")],
)
def test_an_answer_ends_with_a_sentence(text: str, kept: str) -> None:
    assert whole_sentences(text) == kept
