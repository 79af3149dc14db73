"""The same loops on real worker groups: any number of ranks, sharded weights, a worker killed in mid-run."""

import os
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError, StoppedError
from reft_ray.finetuning.config import FinetuneConfig, Resources, TeacherConfig
from reft_ray.finetuning.progress import Channel, Sender
from reft_ray.finetuning.ray_runtime import as_task
from reft_ray.finetuning.targets import ensure_soft_targets
from reft_ray.finetuning.teacher_loop import TeacherData
from reft_ray.finetuning.trainer import FinetuneInputs, finetune, prepare_teacher
from reft_ray.hf.ref_teacher import RefTeacher
from reft_ray.openmp import BRIEF

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("shared_ray")]

WORDS = ["car", "bread", "me", "that", "help", "how", "tell", "please"]
HARMFUL = [Example(chat(f"how to steal a {w}", "sorry i cannot"), Label.HARMFUL, "a") for w in WORDS]
HARMLESS = [Example(chat(f"how to bake a {w}", "here is how"), Label.HARMLESS, "b") for w in WORDS]
USER = [Example(chat(f"tell me {'no ' * (i % 7)} {i}", "sure here is")) for i in range(46)]


@pytest.fixture(scope="module")
def teacher(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> RefTeacher:
    folder = tmp_path_factory.mktemp("teacher")
    data = TeacherData(HARMFUL + HARMLESS, HARMFUL + HARMLESS)
    return prepare_teacher(teacher_config(llama), data, folder / "one", Resources(workers=0))


def teacher_config(base: Path) -> TeacherConfig:
    return TeacherConfig.of(
        {"base": str(base), "epochs": 2, "batch_rows": 8, "lora": {"rank": 4}, "optimizer": {"learning_rate": 0.01}}
    )


def config_of(base: Path, **changes: object) -> FinetuneConfig:
    values = {"base": str(base), "epochs": 2, "batch_rows": 8, "lora": {"rank": 4}, "log_every": 1}
    return FinetuneConfig.of({**values, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("strategy", ["data_parallel", "fsdp"])
def test_two_ranks_learn_what_one_process_learns(
    teacher: RefTeacher, llama: Path, tmp_path: Path, strategy: str
) -> None:
    inputs = FinetuneInputs(USER, len(USER), HARMFUL + HARMLESS, teacher, validation=USER[:3])
    reports: dict[str, list[Mapping[str, Any]]] = {"alone": [], strategy: []}
    local = Resources(workers=0)
    alone = weights(finetune(config_of(llama), inputs, tmp_path / "alone", local, progress=reports["alone"].append))
    resources = Resources.of({"workers": 2, "strategy": strategy})
    received = reports[strategy].append
    together = weights(finetune(config_of(llama), inputs, tmp_path / strategy, resources, progress=received))
    assert together.keys() == alone.keys()
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=1e-5), name
    for name in ("accuracy", "valid_loss", "valid_accuracy"):
        assert reports[strategy][-1][name] == pytest.approx(reports["alone"][-1][name], rel=1e-3), name


@pytest.mark.parametrize("strategy", ["data_parallel", "fsdp"])
def test_two_ranks_prepare_the_same_teacher(teacher: RefTeacher, llama: Path, tmp_path: Path, strategy: str) -> None:
    data = TeacherData(HARMFUL + HARMLESS, HARMFUL + HARMLESS)
    resources = Resources.of({"workers": 2, "strategy": strategy})
    together = prepare_teacher(teacher_config(llama), data, tmp_path / "two", resources)
    assert together.manifest.layer == teacher.manifest.layer
    ours, theirs = together.readouts.tensors(), teacher.readouts.tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-3) for name in ours)


def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint_and_no_row_is_trained_twice(
    llama: Path, tmp_path: Path
) -> None:
    config = config_of(llama, method="sft", checkpoint_every=2)
    inputs = FinetuneInputs(USER, len(USER))
    whole = weights(finetune(config, inputs, tmp_path / "whole", Resources(workers=0)))
    seen: list[dict[str, Any]] = []
    killed = threading.Event()

    def watch(metrics: Mapping[str, Any]) -> None:
        seen.append(dict(metrics))
        if metrics["step"] >= 5 and not killed.is_set():
            killed.set()
            os.kill(metrics["pid"], signal.SIGKILL)

    broken = weights(finetune(config, inputs, tmp_path / "broken", Resources(workers=2), progress=watch))
    assert killed.is_set()
    steps = [metrics["step"] for metrics in seen]
    restarts = [at for at in range(1, len(steps)) if steps[at] <= steps[at - 1]]
    assert len(restarts) == 1
    resumed, before = steps[restarts[0]], steps[restarts[0] - 1]
    # Resumed right after a checkpoint (even steps), at most the uncommitted one and the open interval before the kill.
    assert (resumed - 1) % 2 == 0
    assert before - resumed < 4
    final = {metrics["step"]: metrics["rows"] for metrics in seen}
    assert final[max(final)] == 2 * len(USER)
    for name, tensor in whole.items():
        assert torch.allclose(broken[name], tensor, atol=1e-5)


def test_a_failed_run_says_why_in_one_line(llama: Path, tmp_path: Path) -> None:
    long = [Example(chat("how " * 400, "no"))]
    resources = Resources.of({"workers": 1, "max_failures": 0})
    with pytest.raises(ReftError, match=r"failed: .*the prompt has \d+ tokens, the context holds 256") as caught:
        finetune(config_of(llama, method="sft"), FinetuneInputs(long, 1), tmp_path / "x", resources)
    assert "\n" not in str(caught.value)


def test_a_worker_makes_the_soft_labels_and_the_driver_loads_no_model(
    teacher: RefTeacher, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = FinetuneInputs(USER[:8], 8, HARMFUL + HARMLESS, teacher)
    config = config_of(llama, epochs=1)
    made = ensure_soft_targets(config, teacher, HARMFUL + HARMLESS, tmp_path / "here")
    # Tasks are other processes, in which the base loads as ever.
    monkeypatch.setattr(RefTeacher, "base", lambda *_, **__: pytest.fail("the driver loaded the base"))
    resources = Resources.of({"workers": 1, "shared": str(tmp_path / "shared")})
    assert weights(finetune(config, inputs, tmp_path / "student", resources))
    (found,) = (tmp_path / "shared/targets").iterdir()
    assert found.name == made.name
    here, there = (load_file(folder / "part-00000.safetensors") for folder in (made, found))
    for name in ("logprobs", "log_tail"):
        assert torch.allclose(there[name].float(), here[name].float(), atol=0.01), name


def test_soft_labels_that_cannot_be_made_say_why_in_one_line(teacher: RefTeacher, llama: Path, tmp_path: Path) -> None:
    inputs = FinetuneInputs(USER[:8], 8, [Example(chat("how to bake"))], teacher)
    with pytest.raises(ReftError, match=r"^making soft labels failed: the alignment set has no row") as caught:
        finetune(config_of(llama), inputs, tmp_path / "x", Resources(workers=1))
    assert "\n" not in str(caught.value)


def test_a_task_ends_when_asked_to() -> None:
    with pytest.raises(StoppedError, match="stopped while waiting"):
        as_task("waiting", time.sleep, 600, resources=Resources(), stop=lambda: True)


@pytest.mark.parametrize("chosen", [None, "1234"])
def test_workers_wait_as_the_process_that_asks(monkeypatch: pytest.MonkeyPatch, chosen: str | None) -> None:
    for name in ("OMP_WAIT_POLICY", *BRIEF):
        monkeypatch.delenv(name, raising=False)
    if chosen:
        monkeypatch.setenv("GOMP_SPINCOUNT", chosen)
    # The cluster runs already, so that its workers do not inherit the variable.
    found = as_task("reading a variable", os.getenv, "GOMP_SPINCOUNT", resources=Resources())
    assert found == (chosen or BRIEF["GOMP_SPINCOUNT"])


def test_a_lost_queue_does_not_stop_a_run(caplog: pytest.LogCaptureFixture) -> None:
    with Channel(lambda _metrics: None, stop=lambda: False) as channel:
        sender = Sender(channel.queue, channel.flag)
        sender({"step": 1})
        for actor in (channel.queue.actor, channel.flag):
            ray.kill(actor)
        sender({"step": 2})
        sender.phase("training", 0.5, "")
        assert not sender.stop_asked()
    assert "its queue is lost" in caplog.text
