import math
from pathlib import Path

import pytest
import torch

from reft_ray.core.batch import Batch, TokenizedExample, collate, numbered
from reft_ray.core.conversation import Example, chat
from reft_ray.core.errors import ReftError
from reft_ray.core.forward import Predictions
from reft_ray.core.guided import cached_teacher, live_teacher
from reft_ray.core.losses import divergence_sum
from reft_ray.core.targets import ABSENT, SoftTargets, soften
from reft_ray.hf import soft_targets
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.loading import load_base
from reft_ray.hf.soft_targets import (
    OMITTED,
    StoredTargets,
    alignment_key,
    is_complete,
    key_name,
    write_soft_targets,
)

ANSWERS = ["sorry i cannot help with that", "no", "here is how", "sure here is bread"]


def test_stored_labels_equal_the_live_teacher_for_the_whole_vocabulary_and_bound_it_for_few_tokens(
    llama: Path, tmp_path: Path
) -> None:
    base = load_base(str(llama))
    fmt = ChatFormat(base.tokenizer)
    rows = numbered(fmt.encode(Example(chat(f"tell me {i}", answer))) for i, answer in enumerate(ANSWERS))
    teacher = ModelForward(base.model)
    batch = collate([rows[2], rows[0]], fmt.pad_id)  # not in the stored order
    student = torch.randn(len(batch.labels_N), len(base.tokenizer), generator=torch.Generator().manual_seed(0))
    live = float(divergence_sum(live_teacher(teacher)(batch), student))
    found = {}
    for k in (4, 64, 10_000):
        key = alignment_key(rows, "rt-1", 1.0, k)
        path = tmp_path / key_name(key)
        write_soft_targets(path, teacher, rows, key, fmt.pad_id, max_tokens=24)
        found[k] = float(divergence_sum(cached_teacher(StoredTargets(path, key))(batch), student))
    most = 1e-3 * len(batch.labels_N)
    assert found[10_000] == pytest.approx(live, abs=most)
    # Merging the tail into one outcome loses divergence, less with more tokens kept.
    assert found[4] - most <= found[64] <= live + most
    assert len(StoredTargets(path, key)) == len(rows)


class Peaked:
    """A teacher whose positions are from nearly certain to undecided, as those of real answers are."""

    def __init__(self, vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def logits(self, batch: Batch) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(batch.index_B[0]))
        scale_N1 = torch.rand(batch.labelled, 1, generator=generator) * 8
        return torch.randn(batch.labelled, self.vocabulary, generator=generator) * scale_N1

    def predictions(self, batch: Batch) -> Predictions:
        return Predictions.of(self.logits(batch))


@pytest.mark.parametrize("vocabulary", [300, 70_000, 262_144])
def test_stored_labels_are_exact_to_a_thousandth_of_a_nat(tmp_path: Path, vocabulary: int) -> None:
    rows = numbered(TokenizedExample([1] * 13, [False] + [True] * 12, 0) for _ in range(2))
    teacher, key = Peaked(vocabulary), alignment_key(rows, "rt-1", 1.0, 64)
    write_soft_targets(tmp_path / "t", teacher, rows, key, 0, max_tokens=13)
    stored = StoredTargets(tmp_path / "t", key)
    for row in rows:
        batch = collate([row], 0)
        whole, found = soften(teacher.logits(batch), 64), stored.rows([row.index])
        total_N = found.logprobs_NK.exp().sum(1) + found.tail_N
        assert torch.allclose(total_N, torch.ones(12), atol=1e-5)
        for n in range(12):
            kept = {int(i): float(p) for i, p in zip(found.ids_NK[n], found.logprobs_NK[n], strict=True) if p > ABSENT}
            top = {int(i): float(p) for i, p in zip(whole.ids_NK[n], whole.logprobs_NK[n], strict=True)}
            assert kept.keys() <= top.keys()
            assert sum(math.exp(p) for i, p in top.items() if i not in kept) < OMITTED
        student_NV = torch.randn(12, vocabulary, generator=torch.Generator().manual_seed(9))
        for n in range(12):
            one = slice(n, n + 1)
            exact, read = (
                float(divergence_sum(SoftTargets(t.ids_NK[one], t.logprobs_NK[one], t.tail_N[one]), student_NV[one]))
                for t in (whole, found)
            )
            assert read == pytest.approx(exact, abs=3e-3)
        pair = [float(divergence_sum(t, student_NV)) / 12 for t in (whole, found)]
        assert pair[1] == pytest.approx(pair[0], abs=1e-3)


def test_absent_tokens_have_no_part_in_the_divergence_and_its_gradient() -> None:
    logits_NV = torch.tensor([[3.0, 1.0, 0.5, -1.0, -4.0]])
    narrow, wide = soften(logits_NV, 2), soften(logits_NV, 2)
    padded = SoftTargets(
        torch.cat([wide.ids_NK, torch.zeros(1, 3, dtype=torch.int32)], 1),
        torch.cat([wide.logprobs_NK, torch.full((1, 3), ABSENT)], 1),
        wide.tail_N,
    )
    found = []
    for targets in (narrow, padded):
        student_NV = torch.tensor([[0.3, 0.1, 0.9, 0.2, 0.0]], requires_grad=True)
        loss = divergence_sum(targets, student_NV)
        loss.backward()
        found.append((float(loss.detach()), student_NV.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_processes_share_the_parts_and_a_second_start_computes_only_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(soft_targets, "PART_ROWS", 2)
    rows = numbered(TokenizedExample([1] * n, [False] + [True] * (n - 1), 0) for n in (3, 9, 4, 2, 7, 5, 6))
    key = alignment_key(rows, "rt-1", 1.0, 8)
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    write_soft_targets(alone, Peaked(50), rows, key, 0, max_tokens=1)
    write_soft_targets(shared, Peaked(50), rows, key, 0, max_tokens=1, share=(1, 2))
    assert not is_complete(shared)
    assert sorted(path.name for path in shared.iterdir()) == ["part-00001.safetensors", "part-00003.safetensors"]
    calls = []

    class Counted(Peaked):
        def logits(self, batch: Batch) -> torch.Tensor:
            calls.append(len(batch))
            return super().logits(batch)

    write_soft_targets(shared, Counted(50), rows, key, 0, max_tokens=1)
    assert sum(calls) == 4
    one, other = (StoredTargets(path, key).rows(range(7)) for path in (alone, shared))
    assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in ("ids_NK", "logprobs_NK", "tail_N"))
    assert len(one.tail_N) == sum(row.trained_tokens for row in rows)


def test_labels_of_a_different_teacher_or_set_are_refused(llama: Path, tmp_path: Path) -> None:
    base = load_base(str(llama))
    fmt = ChatFormat(base.tokenizer)
    rows = numbered([fmt.encode(Example(chat("tell me", "no")))])
    key = alignment_key(rows, "rt-1", 1.0, 4)
    write_soft_targets(tmp_path / "t", ModelForward(base.model), rows, key, fmt.pad_id)
    with pytest.raises(ReftError, match="teacher=rt-1, not rt-2"):
        StoredTargets(tmp_path / "t", alignment_key(rows, "rt-2", 1.0, 4))
    with pytest.raises(ReftError, match="no soft targets at"):
        StoredTargets(tmp_path / "absent", key)
    assert key_name(key) != key_name(alignment_key(rows, "rt-2", 1.0, 4))
    with pytest.raises(ReftError, match="nothing to distil"):
        write_soft_targets(tmp_path / "e", ModelForward(base.model), [], key, fmt.pad_id)
