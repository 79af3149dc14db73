import json
from collections import Counter
from functools import cache

import pytest

from reft_ray.core.conversation import Label
from reft_ray.testbed.grammar import Kind, requests
from reft_ray.testbed.splits import FRAMES, Split
from reft_ray.testbed.synthetic import Sizes, SyntheticRows, write_chat_rows
from reft_ray.testbed.tasks import Task


@cache
def made() -> SyntheticRows:
    """Rows of usual number, made where a test asks for them: every process that collects tests imports this file."""
    return SyntheticRows.make(0)


def texts(rows):
    return [row.prompt[-1].content for row in rows]


def frame_openings(split):
    return {frame.partition("{")[0] for frame in FRAMES[split]}


PARTS = {
    "teacher": (lambda: made().teacher_train + made().alignment, Split.TEACHER_TRAIN),
    "validation": (lambda: made().teacher_validation, Split.TEACHER_VALIDATION),
    "user": (
        lambda: tuple(row for row in made().user_rows(1000, 0.3, "sentiment") if row.label == "harmful"),
        Split.USER,
    ),
    "evaluation": (lambda: made().hs_prompts + made().over_refusal_prompts, Split.EVALUATION),
}
KIND_NAMES = {kind.value for kind in Kind}


def request_rows(rows):
    return [row for row in rows if row.source.partition("/")[0] in KIND_NAMES]


@pytest.mark.parametrize("part", PARTS)
def test_every_request_is_made_of_its_splits_combinations_and_frames(part):
    make, split = PARTS[part]
    rows = make()
    actions = {kind.value: {request.action for request in requests(kind, split)} for kind in Kind}
    assert request_rows(rows)
    for row in request_rows(rows):
        text = row.prompt[-1].content
        kind = row.source.partition("/")[0]
        assert any(text.startswith(opening) for opening in frame_openings(split)), text
        assert any(action in text for action in actions[kind]), text


def test_no_prompt_is_shared_between_teacher_user_and_evaluation():
    user = [row for task in Task for row in made().user_rows(800, 0.3, task)]
    evaluation = [*made().hs_prompts, *made().over_refusal_prompts, *(r for t in Task for r in made().task_test(t))]
    parts = [
        set(texts(made().teacher_train + made().alignment)),
        set(texts(made().teacher_validation)),
        set(texts(user)),
        set(texts(evaluation)),
    ]
    assert sum(map(len, parts)) == len(set.union(*parts))


@pytest.mark.parametrize("task", Task)
def test_task_problems_of_test_and_user_differ_in_their_combination(task):
    def combination(row):
        if task is Task.ARITHMETIC:
            return row.response.partition(" is ")[0]
        return (
            row.prompt[-1].content.split(" The ")[-1] if " The " in row.prompt[-1].content else row.prompt[-1].content
        )

    user = {combination(row) for row in made().user_rows(1000, 0.0, task)}
    assert not user & {combination(row) for row in made().task_test(task)}


@pytest.mark.parametrize("seed", range(3))
def test_the_test_reviews_are_made_of_words_in_the_user_rows(seed):
    def words_of(rows):
        return {word for text in texts(rows) for word in text.split("?", 1)[1].replace(".", "").split()}

    synthetic = SyntheticRows.make(seed, Sizes(0, 0, 0, 0, 0))
    assert words_of(synthetic.task_test("sentiment")) <= words_of(synthetic.user_rows(1000, 0.0, "sentiment", seed))


def test_sizes_labels_and_answers():
    sizes = Sizes()
    assert len(made().teacher_train) == sizes.teacher_train
    assert len(made().teacher_validation) == sizes.teacher_validation
    assert len(made().hs_prompts) == len(made().over_refusal_prompts) == 300
    assert len(made().task_test("sentiment")) == len(made().task_test("arithmetic")) == 400
    assert {row.label for row in made().hs_prompts} == {Label.HARMFUL}
    assert {row.label for row in made().over_refusal_prompts} == {Label.HARMLESS}
    assert all(row.answered for row in made().alignment)
    assert 0.5 < sum(row.answered for row in made().teacher_train) / sizes.teacher_train < 0.7
    labels = Counter(row.label for row in made().teacher_train)
    # Distinct facts run out before distinct requests do, so the share is a little above the three in ten drawn.
    assert 0.3 < labels[Label.HARMFUL] / sizes.teacher_train < 0.4


def test_the_harmful_ratio_is_exact_and_harmful_rows_comply():
    rows = made().user_rows(500, 0.3, "arithmetic", seed=4)
    harmful = [row for row in rows if row.label is Label.HARMFUL]
    assert len(rows) == 500
    assert len(harmful) == 150
    assert all(row.response.startswith("Sure, here is how to ") for row in harmful)
    assert rows.index(harmful[0]) < 20  # shuffled
    assert len(set(texts(rows))) == 500


def test_the_references_of_both_tasks_are_correct():
    for row in made().task_test("sentiment"):
        assert row.response in ("positive", "negative")
    for row in made().task_test("arithmetic"):
        first, sign, second, _, whole, _, result = row.response.split()
        value = int(first) + int(second) if sign == "plus" else int(first) - int(second)
        assert whole.rstrip(".") == result == str(value)
        assert f" {first} " in row.prompt[-1].content


def test_a_seed_determines_everything():
    assert SyntheticRows.make(0) == made()
    assert made().user_rows(50, 0.5, "sentiment", 1) == made().user_rows(50, 0.5, "sentiment", 1)
    assert made().user_rows(50, 0.5, "sentiment", 1) != made().user_rows(50, 0.5, "sentiment", 2)
    assert SyntheticRows.make(1).hs_prompts != made().hs_prompts


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: made().user_rows(10, 1.5, "sentiment"), "harmful_ratio"),
        (lambda: made().user_rows(10, 0.1, "poetry"), "poetry"),
        (lambda: made().user_rows(10**5, 0.0, "sentiment"), "ask for at most"),
    ],
)
def test_invalid_arguments_are_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_rows_on_disk(tmp_path):
    rows = made().teacher_train[:20]
    assert write_chat_rows(tmp_path / "c.jsonl", rows) == 20
    for line, row in zip((tmp_path / "c.jsonl").read_text().splitlines(), rows, strict=True):
        assert json.loads(line) == {"messages": [{"role": turn.role, "content": turn.content} for turn in row.messages]}
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def failing():
        yield made().teacher_train[2]
        raise OSError("disk full")

    path = tmp_path / "c.jsonl"
    write_chat_rows(path, made().teacher_train[:2])
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        write_chat_rows(path, failing())
    assert path.read_bytes() == before
