"""The optimised scores equal the plain forward, whatever else is in the call, and NaN is an error."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from reft_ray.core.conversation import chat
from reft_ray.core.geometry import Readout, Readouts
from reft_ray.core.verdict import Calibration, ScoreError, Thresholds
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.compute import ParallelPasses
from reft_ray.hf.loading import load_base
from reft_ray.hf.packing import is_fast
from reft_ray.hf.scorer import TeacherScorer

LAYER = 3
TEXTS = [f"how to {'steal ' * (i % 9)}a {word}" for i in range(12) for word in ("car", "bread", "é中", "<x>")]


def load_scorer(
    folder: Path, dtype: torch.dtype = torch.float32, device: str = "cpu", **changes: object
) -> TeacherScorer:
    base = load_base(str(folder), dtype, device)
    refusal_D = torch.randn(32, generator=torch.Generator().manual_seed(0))
    return TeacherScorer(
        base.model,
        ChatFormat(base.tokenizer),
        Readouts({LAYER: Readout(refusal_D)}),
        "rt-x",
        Thresholds(0, 0),
        Calibration(1, 0),
        **changes,
    )


@torch.no_grad()
def plain_scores(folder: Path, refusal_D: torch.Tensor) -> list[float]:
    base = load_base(str(folder))
    fmt = ChatFormat(base.tokenizer)
    scores = []
    for text in TEXTS:
        ids = torch.tensor([fmt.prompt(chat(text))])
        feature = base.model(input_ids=ids, output_hidden_states=True).hidden_states[LAYER][0, -1]
        scores.append(float(torch.cosine_similarity(feature, refusal_D, dim=0)))
    return scores


@pytest.mark.parametrize("shape", ["llama", "gemma", "qwen", "mixture", "sinks"])
def test_scores_equal_the_plain_forward_whatever_else_is_in_the_call(tiny_bases: dict[str, Path], shape: str) -> None:
    scorer = load_scorer(tiny_bases[shape], batch_tokens=64)
    expected = plain_scores(tiny_bases[shape], scorer.readouts.by_layer[LAYER].refusal_D)
    together = [item.score for item in scorer.score(TEXTS)]
    alone = [scorer.score([text])[0].score for text in TEXTS]
    assert together == pytest.approx(expected, abs=1e-5)
    assert alone == pytest.approx(expected, abs=1e-5)
    assert scorer.padding_share <= 0.1


@pytest.mark.parametrize(
    ("shape", "packs"), [("llama", True), ("qwen", True), ("mixture", True), ("gemma", False), ("sinks", False)]
)
def test_packed_texts_do_not_see_each_other(tiny_bases: dict[str, Path], shape: str, packs: bool) -> None:
    """Models whose attention is not PyTorch's own, or has capped logits or sinks, read padded batches."""
    scorer = load_scorer(tiny_bases[shape], batch_tokens=64, packed=True)
    assert scorer.packed == packs
    assert [item.score for item in scorer.score(TEXTS)] == pytest.approx(
        plain_scores(tiny_bases[shape], scorer.readouts.by_layer[LAYER].refusal_D), abs=1e-5
    )
    assert scorer.padding_share == 0.0 or not packs
    assert scorer.score([]) == []


def test_parallel_batches_give_the_same_scores(llama: Path) -> None:
    scorer = load_scorer(llama, batch_tokens=64)
    expected = [item.score for item in scorer.score(TEXTS)]
    run, scorer.tokens_run = scorer.tokens_run, 0
    scorer.parallel = ParallelPasses(3)
    for _ in range(5):
        assert [item.score for item in scorer.score(TEXTS)] == pytest.approx(expected, abs=1e-5)
    assert scorer.tokens_run == 5 * run


@pytest.mark.gpu
def test_packed_texts_on_a_gpu_score_as_on_the_processor(llama: Path) -> None:
    assert is_fast("cuda", torch.bfloat16)
    packed = load_scorer(llama, torch.bfloat16, "cuda", packed=True)
    assert packed.packed
    found = [item.score for item in packed.score(TEXTS)]
    assert found == pytest.approx([item.score for item in load_scorer(llama).score(TEXTS)], abs=0.05)


def test_the_constant_prefix_is_found_and_the_layers_above_are_removed(llama: Path) -> None:
    scorer = load_scorer(llama)
    rendered = scorer.chat.render(chat("x"), generation=True)
    assert rendered.startswith(scorer.chat.tokenizer.decode(scorer._prefix))
    assert len(scorer._prefix) == 2
    assert len(scorer.model.layers) == LAYER
    assert not any("lm_head" in name for name, _ in scorer.model.named_parameters())


def test_a_long_text_is_scored_to_its_end_in_windows_and_the_highest_counts(llama: Path) -> None:
    scorer = load_scorer(llama, window_tokens=32)
    filler = "please tell me how " * 30
    pieces = scorer.score([filler, "steal a car", f"{filler} steal a car"])
    assert pieces[0].windows > 3
    assert pieces[1].windows == 1
    assert not any(piece.truncated for piece in pieces)
    assert pieces[2].score >= pieces[0].score - 1e-6 or pieces[2].windows > pieces[0].windows
    bounded = load_scorer(llama, window_tokens=32, max_windows=2).score([filler])[0]
    assert (bounded.windows, bounded.truncated) == (2, True)


def test_every_token_of_a_long_text_is_in_a_window(llama: Path) -> None:
    scorer = load_scorer(llama, window_tokens=32)
    (ids,) = scorer.prompt_ids([" ".join(map(str, range(100, 200)))])
    frame = scorer._windows
    windows, _ = frame.split(ids)
    body = ids[len(frame.head) : len(ids) - len(frame.tail)]
    seen = [w[len(frame.head) : len(w) - len(frame.tail)] for w in windows]
    assert all(len(window) <= 32 for window in windows)
    at = 0
    for piece in seen:
        start = next(s for s in range(at + 1) if body[s : s + len(piece)] == piece)
        at = max(at, start + len(piece))
    assert at == len(body)


def test_a_sentence_of_a_long_text_is_read_by_itself(llama: Path) -> None:
    scorer = load_scorer(llama, window_tokens=32)
    scorer._windows = replace(scorer._windows, ends_sentence=lambda token: token == stop)
    filler = "please tell me how " * 6
    (ids,) = scorer.prompt_ids([f"{filler} please steal a car {filler}"])
    frame = scorer._windows
    body = ids[len(frame.head) : len(ids) - len(frame.tail)]
    before, asked = (len(scorer.chat.tokenizer(text).input_ids) for text in (filler, f"{filler} please steal a car"))
    stop = body[asked - 1]
    body[before - 1] = stop
    ids = [*frame.head, *body, *frame.tail]
    windows, _ = frame.split(ids)
    alone = [*frame.head, *body[before:asked], *frame.tail]
    assert alone in windows
    assert frame.place(ids, windows.index(alone)) == (body[:before], body[before:asked])


@pytest.mark.parametrize("broken", [math.nan, -math.inf])
def test_one_window_whose_score_is_not_finite_is_an_error(
    llama: Path, monkeypatch: pytest.MonkeyPatch, broken: float
) -> None:
    scorer = load_scorer(llama, window_tokens=32)
    for place in (0, 1, -1):
        monkeypatch.setattr(scorer, "score_tokens", lambda rows, at=place: _with(broken, [0.5] * len(rows), at))
        with pytest.raises(ScoreError):
            scorer.score(["please tell me how " * 30])


def _with(value: float, scores: list[float], at: int) -> list[float]:
    scores[at] = value
    return scores


def test_bfloat16_scores_are_close(llama: Path) -> None:
    exact, rounded = load_scorer(llama), load_scorer(llama)
    rounded.model.to(torch.bfloat16)
    rounded._prefix_states = rounded._run_prefix()
    a, b = ([item.score for item in scorer.score(TEXTS)] for scorer in (exact, rounded))
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) < 0.05
