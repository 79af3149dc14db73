"""FSDP2 on two gloo ranks: what one process learns, resumed by another number of ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor

from reft_ray.core.conversation import Example, chat
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.export import EXPORT
from reft_ray.finetuning.runtime import LocalRuntime
from reft_ray.finetuning.student_loop import train_student

USER = [Example(chat("tell me " + "how " * i, answer)) for i, answer in enumerate(["sure", "no no", "bake bread"] * 2)]
SHAPES = [("llama", "lora"), ("gemma", "full")]
pytestmark = pytest.mark.slow


class GlooRuntime(LocalRuntime):
    """A rank of a gloo group; checkpoints of all ranks go to one folder."""

    def __init__(self, folder: Path, stop_after: int | None = None) -> None:
        super().__init__(folder)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.stop_after = stop_after
        self.steps = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        moved = tensor.clone()
        dist.all_reduce(moved)
        return moved

    def stop_asked(self) -> bool:
        self.steps += 1
        return self.steps == self.stop_after

    def report(self, metrics: Mapping[str, Any], write: Any = None) -> None:
        if write is not None:
            folder = self.folder / f"checkpoint-{metrics['step']:08d}"
            folder.mkdir(parents=True, exist_ok=True)
            write(folder)
            dist.barrier()


def config_of(base: Path, weights: str, precision: str = "float32") -> FinetuneConfig:
    values = {"base": str(base), "method": "sft", "epochs": 3, "batch_rows": 3, "weights": weights}
    values |= {"micro_batch_tokens": 64, "precision": precision, "packing": True}
    return FinetuneConfig.of({**values, "optimizer": {"learning_rate": 1e-4}})


Job = tuple[Path, FinetuneConfig, int | None]
"""Folder of the checkpoints, configuration, and the step to stop after."""


def _rank(rank: int, world: int, meeting: Path, jobs: list[Job]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for folder, config, stop_after in jobs:
        train_student(GlooRuntime(folder, stop_after), config, USER, sharded=True)
    dist.destroy_process_group()


def newest(folder: Path) -> Path:
    return max(folder.glob("checkpoint-*"))


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in (checkpoint / EXPORT).glob("*.safetensors"):
        found |= load_file(file)
    return found


@pytest.fixture(scope="module")
def runs(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two ranks, in one group: processes take longer to start than to train."""
    folder = tmp_path_factory.mktemp("sharded")
    jobs: list[Job] = [(folder / "narrow", config_of(tiny_bases["llama"], "lora", "bfloat16"), None)]
    for shape, weights in SHAPES:
        config = config_of(tiny_bases[shape], weights)
        jobs += [(folder / f"{shape}-two", config, None), (folder / f"{shape}-stopped", config, 3)]
    mp.spawn(_rank, (2, folder / "meeting", jobs), nprocs=2)
    return folder


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("shape", "weights"), SHAPES)
def test_two_ranks_learn_what_one_process_learns_and_one_resumes_them(
    runs: Path, tiny_bases: dict[str, Path], tmp_path: Path, shape: str, weights: str
) -> None:
    """Gemma ties its embeddings to its head."""
    config = config_of(tiny_bases[shape], weights)
    alone = LocalRuntime(tmp_path / "alone")
    train_student(alone, config, USER)
    expected, found = weights_of(newest(tmp_path / "alone")), weights_of(newest(runs / f"{shape}-two"))
    assert not weights_of(newest(runs / f"{shape}-stopped"))
    train_student(LocalRuntime(runs / f"{shape}-stopped"), config, USER)
    continued = weights_of(newest(runs / f"{shape}-stopped"))
    assert expected.keys() == found.keys() == continued.keys()
    assert expected
    # AdamW turns the rounding of a gradient near zero into a share of the learning rate, here 1e-4.
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)
        torch.testing.assert_close(continued[name], tensor, rtol=0, atol=1e-6)


@pytest.mark.timeout(900)
def test_a_narrow_base_is_sharded_beside_wide_adapters(runs: Path) -> None:
    found = weights_of(newest(runs / "narrow"))
    assert all(tensor.dtype == torch.float32 and bool(tensor.isfinite().all()) for tensor in found.values())
    assert any(bool(tensor.any()) for name, tensor in found.items() if "lora_B" in name)
