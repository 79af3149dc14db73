"""Checkpoints as safetensors and JSON: trainable weights, optimiser, RNG of every rank, and the loop's TrainState.

The position counts rows of the whole run, not of a rank, so a run may resume with another number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from reft_ray.core.errors import ReftError
from reft_ray.finetuning.config import Training
from reft_ray.finetuning.sharding import SHARDS, is_sharded, load_shards, reshard
from reft_ray.hf.adapter_files import read_tensors, write_tensors

_STATE = "state.json"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are learned, by name; of a sharded model their shards."""
    reshard(model)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered from its shards; every rank must call it for a sharded one."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


def _like(value: Tensor, model: Tensor) -> Tensor:
    value = value.to(device=model.device, dtype=value.dtype)
    # Rank 0's value is sent to the others.
    return distribute_tensor(value, model.device_mesh, model.placements) if isinstance(model, DTensor) else value


def gather_weights(model: nn.Module, rank: int) -> dict[str, Tensor]:
    """Whole copies of the trainable weights, one after the other.

    Of a sharded model rank 0 gets them and the others nothing; all must call it.
    """
    keeps = rank == 0 or not is_sharded(model)
    copies = ((name, whole(parameter)) for name, parameter in trainable(model).items())
    return {name: copy.clone() for name, copy in copies if keeps}


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Copies of weights and optimiser state by parameter name."""
    parameters = trainable(model)
    moments = {
        f"{name}.{key}": whole(value).clone()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {"weights": {name: whole(p).clone() for name, p in parameters.items()}, "optimizer": moments}


@dataclass
class TrainState:
    """What a loop has done so far. A checkpoint keeps all of it; each loop adds its fields."""

    step: int = 0


def write_state(
    folder: Path,
    rank: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    config: Training,
    inputs: Mapping[str, str],
) -> None:
    """Write a checkpoint: rank 0 the shared part, every rank its own random state. `state` is a TrainState's dict."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    write_tensors(folder / f"rng-{rank}.safetensors", rng)
    if rank == 0:
        for group, content in tensors.items():
            if content:
                write_tensors(folder / f"{group}.safetensors", content)
        document = {"state": dict(state), "config": config.model_dump(mode="json"), "inputs": dict(inputs)}
        (folder / _STATE).write_text(json.dumps(document), encoding="utf-8")


def read_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The shared part of a checkpoint. Raises ReftError if it is incomplete."""
    if not (folder / _STATE).is_file():
        raise ReftError(f"no checkpoint in {folder}: {_STATE} is missing")
    groups = {f.stem: read_tensors(f) for f in folder.glob("*.safetensors") if not f.stem.startswith("rng-")}
    return groups, json.loads((folder / _STATE).read_text(encoding="utf-8"))


@torch.no_grad()
def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Restore trainable weights; into a sharded model those of rank 0. Raises ReftError if they are another's."""
    parameters = trainable(model)
    reads = not is_sharded(model) or dist.get_rank() == 0
    if reads and parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())[0]
        raise ReftError(f"the checkpoint was written with a different configuration: {odd} is in only one of them")
    for name, parameter in parameters.items():
        value = weights[name] if reads else torch.empty(parameter.shape, dtype=parameter.dtype)
        parameter.copy_(_like(value, parameter))


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Restore the optimiser's moments."""
    for name, parameter in trainable(model).items():
        stored = {key[len(name) + 1 :]: value for key, value in moments.items() if key.startswith(f"{name}.")}
        optimizer.state[parameter] = {
            key: value if value.ndim == 0 else _like(value, parameter) for key, value in stored.items()
        }


def restore_rng(folder: Path, rank: int) -> None:
    """Continue this rank's random numbers; a rank without any in the checkpoint keeps its new seed."""
    file = folder / f"rng-{rank}.safetensors"
    if file.is_file():
        rng = read_tensors(file)
        torch.set_rng_state(rng["cpu"])
        if "cuda" in rng and torch.cuda.is_available():
            torch.cuda.set_rng_state(rng["cuda"])


def restore(
    folder: Path,
    rank: int,
    config: Training,
    inputs: Mapping[str, str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Restore weights, optimiser and random numbers; returns the tensors by group, and the TrainState's dict.

    `inputs` identify what the loop reads, by the names that users know. Raises ReftError when the checkpoint was
    written with a different configuration or different inputs.
    """
    groups, document = read_state(folder)
    if document["config"] != config.model_dump(mode="json"):
        raise ReftError(f"{folder} was written with a different configuration: choose a new run id or remove it")
    for name, value in inputs.items():
        if document.get("inputs", {}).get(name, value) != value:
            raise ReftError(f"{folder} was written with a different {name}: choose a new run id or remove it")
    if (folder / SHARDS).is_dir():
        load_shards(folder, trainable(model), optimizer)
    else:
        restore_weights(model, groups["weights"])
        restore_optimizer(model, optimizer, groups.get("optimizer", {}))
    restore_rng(folder, rank)
    return groups, document["state"]
