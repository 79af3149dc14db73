"""FSDP2 on two gloo ranks: the Ref-Teacher that one process makes, resumed by another number of ranks."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from finetuning.gloo import GlooRuntime, join, newest, weights_of

from reft_ray.core.conversation import Example, Label, chat
from reft_ray.core.errors import ReftError
from reft_ray.finetuning import sharding, teacher_filter
from reft_ray.finetuning.config import Resources, TeacherConfig
from reft_ray.finetuning.export import EXPORT
from reft_ray.finetuning.runtime import LocalRuntime, Runtime
from reft_ray.finetuning.sharding import most_of_ranks
from reft_ray.finetuning.teacher_loop import TeacherData, train_teacher
from reft_ray.finetuning.trainer import prepare_teacher
from reft_ray.hf.ref_teacher import RefTeacher

# Rows of unequal length under a small budget: the ranks' slices make unequally many micro-batches.
LONG = "please tell me how " * 6
HARMFUL = [
    *(Example(chat(f"how to steal a {w}", "sorry i cannot"), Label.HARMFUL, "a") for w in ("car", "bread", "me")),
    *(Example(chat(f"{LONG} to steal {w}"), Label.HARMFUL, "c") for w in ("that", "bread")),
]
HARMLESS = [
    *(Example(chat(f"how to bake a {w}", "here is how"), Label.HARMLESS, "b") for w in ("car", "bread", "me")),
    *(Example(chat(f"{LONG} to bake {w}"), Label.HARMLESS, "c") for w in ("that", "car")),
]
DATA = TeacherData(HARMFUL + HARMLESS, HARMFUL + HARMLESS)
# One answer in all: a step has it on one rank, the other runs along.
SPARSE = TeacherData(
    [*(Example(row.prompt, row.label, row.source) for row in HARMFUL + HARMLESS[1:]), HARMLESS[0]],
    [*HARMFUL[:1], *HARMLESS[:2]],
)
BUILD = {"weights": "none", "feature": "base"}

KINDS: dict[str, tuple[str, TeacherData, dict[str, Any]]] = {
    "lora": ("llama", DATA, {"answer_shares": (1.0, 0.5)}),
    "plain": ("llama", SPARSE, {"geometry": "plain", "margin": 1.0, "layer": 2}),
    "base": ("llama", DATA, {"feature": "base", "answer_shares": (1.0, 0.5)}),
    "recomputed": ("llama", DATA, {"gradient_checkpointing": True}),
    "same-pass": ("llama", DATA, {"answered_rows": 1.0}),
    "full": ("llama", DATA, {"weights": "full"}),
    "tied": ("gemma", SPARSE, {"weights": "full", "geometry": "plain", "margin": 1.0}),
    "build": ("llama", SPARSE, BUILD),
    "build-gemma": ("gemma", DATA, BUILD),
    "filter": ("llama", DATA, {"feature_mix": 0.5}),
}
"""Base, rows and changes of each run; `filter` chooses the filter of the adapter that `lora` trained alone."""
TRAINED = [kind for kind in KINDS if "build" not in kind and kind != "filter"]


def config_of(base: Path, changes: dict[str, Any]) -> TeacherConfig:
    values = {"base": str(base), "epochs": 4, "batch_rows": 6, "micro_batch_tokens": 40, "checkpoint_every": 2}
    values |= {"precision": "float32", "evaluate_every": 2, "optimizer": {"learning_rate": 1e-4}, "sweep": (0.25, 0.75)}
    # Which layers are best would depend on rounding.
    values |= {"average_layers": 3, "shrinkage": 0.2, "feature_mix": None, "tolerance": 0.5}
    if changes.get("weights", "lora") == "lora":
        values["lora"] = {"rank": 4}
    return TeacherConfig.of({**values, **changes})


Job = tuple[Path, TeacherConfig, TeacherData]


def _rank(rank: int, world: int, meeting: Path, jobs: list[Job]) -> None:
    join(rank, world, meeting)

    def noting(count: int, runtime: Runtime) -> int:
        if (most := most_of_ranks(count, runtime)) > count:
            (meeting.parent / f"{sys._getframe(1).f_code.co_name}-fewer").touch()
        return most

    sharding.most_of_ranks = teacher_filter.most_of_ranks = noting
    for folder, config, data in jobs:
        train_teacher(GlooRuntime(folder), config, data, sharded=True)
    dist.destroy_process_group()


def at_step(folder: Path, step: int, copy: Path) -> None:
    """A run that got no further than a checkpoint."""
    name = f"checkpoint-{step:08d}"
    shutil.copytree(folder / name, copy / name)


@pytest.fixture(scope="module")
def runs(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every run in one process, and on two ranks of one group: processes take longer to start than to train."""
    folder = tmp_path_factory.mktemp("teachers")
    jobs: list[Job] = []
    for kind, (shape, data, changes) in KINDS.items():
        if kind == "filter":
            changes = {**changes, "adapter": str(newest(folder / "lora-one") / EXPORT / "adapter")}
        config = config_of(tiny_bases[shape], changes)
        train_teacher(LocalRuntime(folder / f"{kind}-one"), config, data)
        jobs.append((folder / f"{kind}-two", config, data))
        if kind in ("lora", "full"):
            at_step(folder / f"{kind}-one", 2, folder / f"{kind}-widened")
            jobs.append((folder / f"{kind}-widened", config, data))
    jobs.append((folder / "narrow", config_of(tiny_bases["llama"], {"precision": "bfloat16"}), DATA))
    mp.spawn(_rank, (2, folder / "meeting", jobs), nprocs=2)
    return folder


def assert_same_teacher(found: Path, expected: Path) -> None:
    """The same files, tensors and figures, but for rounding."""
    for folder in (found, expected):
        RefTeacher.load(folder / EXPORT)
    names = [sorted(str(p.relative_to(c / EXPORT)) for p in (c / EXPORT).rglob("*")) for c in (found, expected)]
    assert names[0] == names[1]
    tensors, wanted = weights_of(found), weights_of(expected)
    assert tensors.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert tensors[name].dtype == tensor.dtype
        # AdamW turns the rounding of a gradient near zero into a share of the learning rate, here 1e-4. Readouts have
        # values of half precision.
        rtol, atol = (1e-3, 1e-4) if tensor.dtype == torch.float16 else (1e-4, 1e-5)
        torch.testing.assert_close(tensors[name], tensor, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")
    manifests = [json.loads((c / EXPORT / "teacher.json").read_text()) for c in (found, expected)]
    for key in ("layers", "weights", "feature_mix", "window_tokens", "sources", "config"):
        if key == "config":
            [m["config"].pop("sweep_auroc") for m in manifests]
        assert manifests[0][key] == manifests[1][key], key
    assert manifests[0]["quality"]["auroc"] == pytest.approx(manifests[1]["quality"]["auroc"])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_teacher_that_one_process_makes(runs: Path, kind: str) -> None:
    assert_same_teacher(newest(runs / f"{kind}-two"), newest(runs / f"{kind}-one"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", TRAINED)
def test_one_process_resumes_what_two_ranks_wrote(
    runs: Path, tiny_bases: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    shape, data, changes = KINDS[kind]
    at_step(runs / f"{kind}-two", 2, tmp_path)
    train_teacher(LocalRuntime(tmp_path), config_of(tiny_bases[shape], changes), data)
    assert_same_teacher(newest(tmp_path), newest(runs / f"{kind}-one"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["lora", "full"])
def test_two_ranks_resume_what_one_process_wrote(runs: Path, kind: str) -> None:
    assert_same_teacher(newest(runs / f"{kind}-widened"), newest(runs / f"{kind}-one"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_finished_run_that_is_resumed_makes_its_teacher_again(
    runs: Path, tiny_bases: dict[str, Path], tmp_path: Path
) -> None:
    """Without a better checkpoint than the last one, whose adapter was scaled by the share that it answers with."""
    shape, data, changes = KINDS["base"]
    last = newest(runs / "base-two")
    shutil.copytree(last, tmp_path / last.name)
    train_teacher(LocalRuntime(tmp_path), config_of(tiny_bases[shape], changes), data)
    assert_same_teacher(newest(tmp_path), last)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_narrow_base_is_sharded_beside_a_wide_adapter(runs: Path) -> None:
    found = {name: part for name, part in weights_of(newest(runs / "narrow")).items() if "lora_" in name}
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in found.values())
    assert any(bool(tensor.any()) for name, tensor in found.items() if "lora_B" in name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ranks_with_fewer_passes_ran_along(runs: Path) -> None:
    assert {file.name for file in runs.glob("*-fewer")} == {"as_many_as_others-fewer", "prompt_features-fewer"}


def test_nothing_is_sharded_without_workers(llama: Path, tmp_path: Path) -> None:
    resources = Resources.of({"workers": 0, "strategy": "fsdp"})
    with pytest.raises(ReftError, match="workers=0 starts none: set workers"):
        prepare_teacher(config_of(llama, {}), DATA, tmp_path / "teacher", resources)


def test_a_quantised_base_is_not_sharded(llama: Path, tmp_path: Path) -> None:
    config = config_of(llama, {"quantize": "4bit"})
    with pytest.raises(ReftError, match="strategy=fsdp shards whole weights: leave quantize=none"):
        train_teacher(LocalRuntime(tmp_path), config, DATA, sharded=True)
