"""Training as the catalogue counts it, from the metrics of real runs and of one that lost a worker."""

from pathlib import Path

import pytest

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError
from reft_ray.finetuning.config import FinetuneConfig, Resources, TeacherConfig
from reft_ray.finetuning.metrics import TrainingMetrics
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import FinetuneInputs, finetune, prepare_teacher
from reft_ray.telemetry import catalog
from reft_ray.telemetry.recorder import MemoryRecorder

HARMFUL = [Example(chat(f"how to steal a {w}", "sorry i cannot"), Label.HARMFUL) for w in ("car", "bread")]
HARMLESS = [Example(chat(f"how to bake a {w}", "here is how"), Label.HARMLESS) for w in ("car", "bread")]
LOCAL = Resources(workers=0)


def test_both_stages_are_counted(llama: Path, tmp_path: Path) -> None:
    recorder = MemoryRecorder()
    settings = {"base": str(llama), "epochs": 2, "batch_rows": 4, "lora": {"rank": 2}, "log_every": 1}
    rows = HARMFUL + HARMLESS
    teacher = prepare_teacher(
        TeacherConfig.of(settings), TeacherData(rows, rows), tmp_path / "teacher", LOCAL, recorder=recorder
    )
    assert recorder.total(catalog.TRAIN_ROWS, stage="teacher") > 0
    assert {labels["term"] for labels, _ in recorder.series(catalog.TRAIN_LOSS)} == {
        "cross_entropy",
        "refusal",
        "total",
    }

    inputs = FinetuneInputs([Example(chat(f"tell me {'no ' * i}", "sure here is")) for i in range(6)], 6, rows, teacher)
    reports: list[dict] = []
    finetune(FinetuneConfig.of(settings), inputs, tmp_path / "student", LOCAL, None, reports.append, recorder)
    assert recorder.total(catalog.TRAIN_ROWS, stage="student", rows="user") == 12
    assert recorder.total(catalog.TRAIN_TOKENS, stage="student", rows="user") == reports[-1]["user_tokens"]
    aligned = recorder.total(catalog.TRAIN_TOKENS, stage="student", rows="alignment")
    assert aligned == reports[-1]["alignment_tokens"] > 0
    assert recorder.total(catalog.TRAIN_LOSS, stage="student", term="distill") == reports[-1]["distill"]
    assert recorder.total(catalog.TRAIN_KL) == reports[-1]["distill"]
    assert len(recorder.observations(catalog.TRAIN_STEP_SECONDS, stage="student")) == len(reports) - 1
    assert recorder.total(catalog.TRAIN_RESTARTS) == 0


def test_what_is_done_again_after_a_loss_is_counted_once() -> None:
    recorder = MemoryRecorder()
    counting = TrainingMetrics(recorder, "student")
    for step, rows in ((1, 8), (2, 16), (3, 24), (2, 16), (3, 24), (4, 32)):
        counting({"step": step, "user_rows": rows})
    assert recorder.total(catalog.TRAIN_ROWS) == 32
    assert recorder.total(catalog.TRAIN_RESTARTS) == 1


class Longer(list):
    """Rows that turn out to be more, or fewer, than their number says."""

    claimed = 0

    def __len__(self) -> int:
        return self.claimed


@pytest.mark.parametrize(
    ("claimed", "metric"), [(4, catalog.UNSCREENED_ROWS), (9, catalog.UNACCOUNTED_ROWS)], ids=["more", "fewer"]
)
def test_rows_that_the_screening_did_not_count_stop_the_run(llama: Path, tmp_path: Path, claimed: int, metric) -> None:
    recorder = MemoryRecorder()
    rows = Longer(Example(chat(f"tell me {i}", "sure here is")) for i in range(6))
    rows.claimed = claimed
    config = FinetuneConfig.of({"base": str(llama), "method": "sft", "batch_rows": 2, "lora": {"rank": 2}, "epochs": 2})
    with pytest.raises(ReftError, match="screened"):
        finetune(config, FinetuneInputs(rows, claimed), tmp_path / "student", LOCAL, recorder=recorder)
    assert recorder.total(metric) > 0
    assert recorder.total(catalog.UNSCREENED_ROWS) + recorder.total(catalog.UNACCOUNTED_ROWS) == recorder.total(metric)
