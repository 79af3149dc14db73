"""Memory and processors of a made machine, and the micro-batch that fits."""

import os
from pathlib import Path

import pytest
import torch

from reft_ray.hf import machine
from reft_ray.hf.loading import load_base
from reft_ray.hf.lora import LoraSettings, attach
from reft_ray.hf.machine import available_cpus, free_memory, token_bytes, tokens_kept, tokens_that_fit

MIB = 1 << 20


def made(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMORY = {"proc/meminfo": f"MemTotal: 999999 kB\nMemAvailable: {900 * 1024} kB\n"}
V2 = {"proc/self/cgroup": "0::/pod/box\n"}
V1 = {"proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box\n"}


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 900),
        ({**V2, "sys/fs/cgroup/pod/box/memory.max": "max", "sys/fs/cgroup/pod/box/memory.current": "5"}, 900),
        (
            {
                **V2,
                "sys/fs/cgroup/pod/memory.max": str(600 * MIB),
                "sys/fs/cgroup/pod/memory.current": str(500 * MIB),
                "sys/fs/cgroup/pod/memory.stat": f"anon 7\ninactive_file {50 * MIB}\n",
            },
            150,
        ),
        (
            {
                **V1,
                "sys/fs/cgroup/memory/memory.limit_in_bytes": str(300 * MIB),
                "sys/fs/cgroup/memory/memory.usage_in_bytes": str(100 * MIB),
                "sys/fs/cgroup/memory/memory.stat": "rss 1\n",
            },
            200,
        ),
    ],
)
def test_free_memory_is_that_of_the_tightest_limit(tmp_path: Path, files: dict[str, str], free: int) -> None:
    assert free_memory(root=made(tmp_path, {**MEMORY, **files})) == free * MIB


def test_a_machine_that_does_not_say_has_some_memory(tmp_path: Path) -> None:
    assert free_memory(root=tmp_path) == 4096 * MIB


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 8),
        ({**V2, "sys/fs/cgroup/pod/box/cpu.max": "max 100000"}, 8),
        ({**V2, "sys/fs/cgroup/pod/cpu.max": "250000 100000"}, 3),
        ({**V2, "sys/fs/cgroup/pod/cpu.max": "5000 100000"}, 1),
        ({**V1, "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "-1"}, 8),
        (
            {
                **V1,
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            2,
        ),
    ],
)
def test_processors_within_quota_and_affinity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cpus: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)))
    assert available_cpus(made(tmp_path, files)) == cpus


def test_the_estimate_covers_what_autograd_keeps(llama: Path) -> None:
    base = load_base(str(llama))
    model = attach(base.model, "student", LoraSettings(rank=2)).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    rows, length = 4, 64
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.ones(rows, length, dtype=torch.long)).logits.sum()
    per_token = sum(kept.values()) / (rows * length)
    assert 0.5 * token_bytes(model) < per_token < token_bytes(model)
    assert token_bytes(model, recomputed=True) < token_bytes(model)


def test_layers_below_the_lowest_adapter_keep_nothing(llama: Path) -> None:
    whole, upper = (
        attach(load_base(str(llama)).model, "student", LoraSettings(rank=2, first_layer=first)) for first in (1, 2)
    )
    layers = load_base(str(llama)).model.config.num_hidden_layers
    assert token_bytes(upper) == pytest.approx(token_bytes(whole) * (layers - 1) / layers, abs=1)


@pytest.mark.parametrize(("free", "ranks", "tokens"), [(1 << 20, 1, 64), (1 << 40, 1, 8192)])
def test_the_micro_batch_has_a_least_and_a_most(
    llama: Path, monkeypatch: pytest.MonkeyPatch, free: int, ranks: int, tokens: int
) -> None:
    monkeypatch.setattr(machine, "free_memory", lambda _device: free)
    assert tokens_that_fit(load_base(str(llama)).model, "cpu", ranks) == tokens


def test_ranks_share_the_memory_of_a_cpu(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base(str(llama)).model
    monkeypatch.setattr(machine, "free_memory", lambda _device: 2000 * token_bytes(model))
    assert [tokens_that_fit(model, "cpu", ranks) for ranks in (1, 2)] == [960, 448]


def test_a_gpu_without_room_for_activations_computes_them_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_base(str(llama)).model
    reserve = machine._GPU_LOSS
    monkeypatch.setattr(machine, "free_memory", lambda _device: (reserve + 6000 * token_bytes(model)) / 0.75)
    assert tokens_kept(model, "cuda") == tokens_that_fit(model, "cuda") == 5952
    monkeypatch.setattr(machine, "free_memory", lambda _device: (reserve + 1000 * token_bytes(model)) / 0.75)
    assert tokens_kept(model, "cuda") == 960
    assert tokens_that_fit(model, "cuda") > 960
