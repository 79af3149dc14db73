"""FSDP2 on two gloo ranks: what one process learns, resumed by another number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from finetuning.gloo import GlooRuntime, join, newest, weights_of

from reft_ray.core.conversation import Example, chat
from reft_ray.finetuning.config import FinetuneConfig
from reft_ray.finetuning.runtime import LocalRuntime
from reft_ray.finetuning.student_loop import train_student

USER = [Example(chat("tell me " + "how " * i, answer)) for i, answer in enumerate(["sure", "no no", "bake bread"] * 2)]
SHAPES = [("mixture", "lora"), ("llama", "lora"), ("llama", "full"), ("gemma", "full")]
pytestmark = pytest.mark.slow


def config_of(base: Path, weights: str, precision: str = "float32") -> FinetuneConfig:
    values = {"base": str(base), "method": "sft", "epochs": 3, "batch_rows": 3, "weights": weights}
    # A checkpoint of the third step, after a pass over the validation rows.
    values |= {"micro_batch_tokens": 64, "precision": precision, "packing": True, "checkpoint_every": 3}
    return FinetuneConfig.of({**values, "optimizer": {"learning_rate": 1e-4}})


Job = tuple[Path, FinetuneConfig, int | None]
"""Folder of the checkpoints, configuration, and the step to stop after."""


def _rank(rank: int, world: int, meeting: Path, jobs: list[Job]) -> None:
    join(rank, world, meeting)
    for folder, config, stop_after in jobs:
        train_student(GlooRuntime(folder, stop_after), config, USER, sharded=True, validation=USER[:3])
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tiny_bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of two ranks, in one group: processes take longer to start than to train."""
    folder = tmp_path_factory.mktemp("sharded")
    jobs: list[Job] = [(folder / "narrow", config_of(tiny_bases["llama"], "lora", "bfloat16"), None)]
    for shape, weights in SHAPES:
        config = config_of(tiny_bases[shape], weights)
        jobs += [(folder / f"{shape}-{weights}-two", config, None), (folder / f"{shape}-{weights}-stopped", config, 3)]
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
    train_student(alone, config, USER, validation=USER[:3])
    expected, found = weights_of(newest(tmp_path / "alone")), weights_of(newest(runs / f"{shape}-{weights}-two"))
    assert not weights_of(newest(runs / f"{shape}-{weights}-stopped"))
    train_student(LocalRuntime(runs / f"{shape}-{weights}-stopped"), config, USER, validation=USER[:3])
    continued = weights_of(newest(runs / f"{shape}-{weights}-stopped"))
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
