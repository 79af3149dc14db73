"""The gradients of both stages are bit-equal to those of this plain implementation, separate from `reft_ray.core`.

It divides each term by its count and calls `backward` once per micro-batch; the sums are torch's own functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from reft_ray.core.batch import Batch, collate, dummy_batch, numbered
from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.geometry import Readout
from reft_ray.core.guided import Distillation, cached_teacher, guided_step, hard_labels, live_teacher
from reft_ray.core.refusal import RunningRefusal
from reft_ray.core.targets import SoftTargets, soften
from reft_ray.core.teacher import Regulariser, class_sums, teacher_step
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.forward import ModelForward
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach

ALPHA, TEMPERATURE, LAYER, LAMBDA = 0.7, 2.5, 2, 0.3
USER = ["here is how", "sure", "no no no", "bake bread", "help", "car", "sure here is how to bake bread"]
REFUSALS = ["sorry i cannot help with that", "no", "sorry", "i cannot", "no no"]


class Setup:
    """A student with random adapters, another model as its teacher, rows of unequal length."""

    def __init__(self, folder: Path) -> None:
        base = load_base(str(folder))
        self.fmt = ChatFormat(base.tokenizer)
        self.model = attach(base.model, "student", LoraSettings(rank=4), seed=1)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.student = ModelForward(self.model)
        teacher = load_base(str(folder)).model
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.02)
        self.teacher = ModelForward(teacher)
        self.user, self.alignment = self.encoded(USER, Label.HARMLESS), self.encoded(REFUSALS, Label.HARMFUL)

    def encoded(self, answers: Sequence[str], label: Label) -> list:
        ask = "how to steal" if label is Label.HARMFUL else "tell me"
        return numbered(
            self.fmt.encode(Example(chat(f"{ask} {'how ' * i}", answer), label)) for i, answer in enumerate(answers)
        )

    def batches(self, rows: Sequence, size: int) -> list[Batch]:
        return [collate(rows[i : i + size], self.fmt.pad_id) for i in range(0, len(rows), size)]

    def gradients(self) -> dict[str, Tensor]:
        found = {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        self.model.zero_grad(set_to_none=True)
        return found


@pytest.fixture(scope="module")
def setup(llama: Path) -> Setup:
    return Setup(llama)


class Stored:
    """Soft labels of rows, made from the teacher's logits."""

    def __init__(self, setup: Setup, k: int) -> None:
        self.setup, self.k = setup, k

    def rows(self, indices: Sequence[int]) -> SoftTargets:
        with torch.no_grad():
            rows = [collate([self.setup.alignment[i]], self.setup.fmt.pad_id) for i in indices]
            parts = [soften(logits_of(self.setup.teacher, row), self.k, TEMPERATURE) for row in rows]
        return SoftTargets(*(torch.cat([getattr(p, n) for p in parts]) for n in ("ids_NK", "logprobs_NK", "tail_N")))


def logits_of(forward: ModelForward, batch: Batch) -> Tensor:
    return forward.logits(batch)


def tokens(batches: Sequence[Batch]) -> int:
    return sum(int(batch.loss_mask_BT.sum()) for batch in batches)


def naive_divergence(setup: Setup, kind: str, batch: Batch, student_NV: Tensor) -> Tensor:
    if kind == "hard":
        label_N1 = student_NV.gather(-1, batch.labels_N[:, None])
        return (0 - (label_N1 - student_NV.logsumexp(-1, keepdim=True))).sum()
    student_NV = student_NV.float() / TEMPERATURE
    if kind == "live":
        student_log = F.log_softmax(student_NV, dim=-1)
        with torch.no_grad():
            teacher_log = F.log_softmax(logits_of(setup.teacher, batch).float() / TEMPERATURE, dim=-1)
        return TEMPERATURE**2 * F.kl_div(student_log, teacher_log, reduction="sum", log_target=True)
    soft = Stored(setup, 3).rows(batch.index_B.tolist())
    student_NK = student_NV.gather(-1, soft.ids_NK.long()) - student_NV.logsumexp(-1, keepdim=True)
    kept = (soft.logprobs_NK.exp() * (soft.logprobs_NK - student_NK)).sum()
    rest_N = torch.log1p(-student_NK.exp().sum(-1).clamp(max=1.0 - 1e-7))
    tail_N = torch.where(soft.tail_N > 0, soft.tail_N * (soft.tail_N.clamp_min(1e-12).log() - rest_N), 0.0)
    return TEMPERATURE**2 * (kept + tail_N.sum())


def assert_bit_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(bool(tensor.any()) for tensor in expected.values())
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("size", [7, 2])
@pytest.mark.parametrize("kind", ["none", "hard", "live", "cached"])
def test_the_guided_gradient(setup: Setup, kind: str, size: int) -> None:
    user = setup.batches(setup.user, size)
    alignment = [] if kind == "none" else setup.batches(setup.alignment, size)
    n_user, n_alignment = tokens(user), tokens(alignment)
    for batch in user:
        (F.cross_entropy(logits_of(setup.student, batch).float(), batch.labels_N, reduction="sum") / n_user).backward()
    for batch in alignment:
        divergence = naive_divergence(setup, kind, batch, logits_of(setup.student, batch))
        (ALPHA * (divergence / n_alignment)).backward()
    expected = setup.gradients()
    labels = {"live": live_teacher(setup.teacher), "cached": cached_teacher(Stored(setup, 3))}.get(kind, hard_labels)
    distillation = Distillation(labels, ALPHA, 1.0 if kind == "hard" else TEMPERATURE)
    guided_step(setup.student, user, alignment, distillation)
    assert_bit_equal(setup.gradients(), expected)


@pytest.mark.parametrize("size", [12, 3])
@pytest.mark.parametrize("missing", ["nothing", "refusals", "answers", "rank"])
def test_the_teachers_gradient_and_refusal_feature(setup: Setup, size: int, missing: str) -> None:
    unanswered = [row.prompt_only() for label in Label for row in setup.encoded(["x"] * 3, label)]
    if missing == "rank":
        batches = [dummy_batch(setup.fmt.pad_id), *setup.batches(setup.user + setup.alignment, size)]
    else:
        answered = {"nothing": setup.user[:3] + setup.alignment, "refusals": setup.user, "answers": []}[missing]
        batches = setup.batches(unanswered, size) + (setup.batches(answered, size) if answered else [])
    harmful_tokens = sum(int(b.loss_mask_BT[b.harmful_B].sum()) for b in batches)
    helpful_tokens = tokens(batches) - harmful_tokens
    rows = [sum(int((b.label_B == label).sum()) for b in batches) for label in (0, 1)]

    def class_means() -> list[Tensor]:
        sums = torch.zeros(2, 1, dtype=torch.float64)
        with torch.no_grad():
            for batch in batches:
                feature_BD = features_of(setup.student, batch).double()
                if sums.shape[1] == 1:
                    sums = torch.zeros(2, feature_BD.shape[1], dtype=torch.float64)
                for label in (0, 1):
                    sums[label] += feature_BD[batch.label_B == label].sum(0)
        return [(sums[label] / rows[label]).float() for label in (0, 1)]

    harmless_D, harmful_D = class_means()
    refusal_D = harmful_D - harmless_D
    for batch in batches:
        logits_NV, feature_BD = both_of(setup.student, batch)
        loss = feature_BD.new_zeros((), dtype=torch.float32)
        refusing_N = batch.harmful_B[:, None].expand_as(batch.loss_mask_BT)[batch.loss_mask_BT]
        for chosen_N, count in ((refusing_N, harmful_tokens), (~refusing_N, helpful_tokens)):
            if bool(chosen_N.any()):
                chosen = F.cross_entropy(logits_NV[chosen_N].float(), batch.labels_N[chosen_N], reduction="sum")
                loss = loss + chosen / count
        score_B = F.cosine_similarity(feature_BD.float(), refusal_D, dim=-1)
        harmful, harmless = (1.0 - score_B)[batch.label_B == 1].sum(), (1.0 + score_B)[batch.label_B == 0].sum()
        loss = loss + LAMBDA * (harmful / rows[1] + harmless / rows[0])
        loss.backward()
    expected = setup.gradients()
    running = RunningRefusal(0.9)
    running.update(class_sums(setup.student, batches, LAYER))
    _, sums = teacher_step(setup.student, batches, LAYER, Regulariser(Readout(running.refusal_D), LAMBDA))
    running.update(sums)
    assert_bit_equal(setup.gradients(), expected)
    assert torch.equal(
        running.refusal_D, torch.lerp(harmful_D, harmful_D, 0.9) - torch.lerp(harmless_D, harmless_D, 0.9)
    )


def features_of(forward: ModelForward, batch: Batch) -> Tensor:
    return forward.features(batch, LAYER)


def both_of(forward: ModelForward, batch: Batch) -> tuple[Tensor, Tensor]:
    if not bool(batch.loss_mask_BT.any()):
        return torch.zeros(0, 1), features_of(forward, batch)
    predictions, feature_BD = forward.predictions_and_features(batch, LAYER)
    return predictions.logits(), feature_BD
