"""The rows of a comparison."""

from collections import Counter

import pytest

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.experiments.bench import rows as bench_rows
from reft_ray.experiments.bench.rows import builtin_rows, folder_rows, sample_rows
from reft_ray.hf.loading import load_tokenizer
from reft_ray.testbed.synthetic import Sizes, SyntheticRows

SIZES = Sizes(20, 20, 20, 20, 20, 20)


@pytest.mark.parametrize("part", ["task_test", "user_rows"])
def test_different_rows_have_different_identities(part, monkeypatch):
    before = builtin_rows(SIZES).identity
    assert builtin_rows(SIZES).identity == before
    drawn = getattr(SyntheticRows, part)
    monkeypatch.setattr(SyntheticRows, part, lambda *args: drawn(*args)[1:])
    assert builtin_rows(SIZES).identity != before


def test_prompts_are_sampled_from_all_sources():
    rows = [Example(chat(f"{source} {number}"), Label.HARMFUL, source) for source in "abcd" for number in range(50)]
    asked = sample_rows(rows, 100)
    assert asked == sample_rows(rows, 100)
    assert len({row.prompt for row in asked}) == 100
    assert min(Counter(row.source for row in asked).values()) > 10
    assert len(sample_rows(rows, 1000)) == 200


def test_worked_answers_fit_their_answer_tokens(shared_data, monkeypatch):
    # The other tasks' tens of thousands of rows take seconds to read.
    monkeypatch.setattr(bench_rows, "MATCHES", {"gsm8k": bench_rows.MATCHES["gsm8k"]})
    task = folder_rows(shared_data / "data").tasks["gsm8k"]
    tokenizer = load_tokenizer(str(shared_data / "models/base-7m"))
    lengths = [len(tokenizer(row.response)["input_ids"]) for row in task.test]
    assert sum(length <= task.answer_tokens for length in lengths) > 0.9 * len(lengths)
