"""Training state as safetensors and JSON: trainable weights, optimiser, RNG of every rank, data position.

The position counts rows of the whole run, not of a rank, so a run may resume with another number of workers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from reft_ray.core.errors import ReftError
from reft_ray.finetuning.config import Training
from reft_ray.hf.tensor_files import read_tensors, write_tensors

_STATE = "state.json"


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are learned, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(tensor: Tensor) -> Tensor:
    """A tensor on the CPU, gathered from its shards; every rank must call it for a sharded one."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


def _like(value: Tensor, model: Tensor) -> Tensor:
    value = value.to(device=model.device, dtype=value.dtype)
    return distribute_tensor(value, model.device_mesh, model.placements) if isinstance(model, DTensor) else value


def gather_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Copies of weights and optimiser state, whole tensors by parameter name; a collective under sharding."""
    parameters = trainable(model)
    moments = {
        f"{name}.{key}": whole(value).clone()
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {"weights": {name: whole(p).clone() for name, p in parameters.items()}, "optimizer": moments}


def write_state(folder: Path, rank: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> None:
    """Write a checkpoint: rank 0 the shared part, every rank its own random state."""
    rng = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        rng["cuda"] = torch.cuda.get_rng_state()
    write_tensors(folder / f"rng-{rank}.safetensors", rng)
    if rank == 0:
        for group, content in tensors.items():
            write_tensors(folder / f"{group}.safetensors", content)
        (folder / _STATE).write_text(json.dumps(dict(state)), encoding="utf-8")


def read_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The shared part of a checkpoint. Raises ReftError when it is not whole."""
    if not (folder / _STATE).is_file():
        raise ReftError(f"no checkpoint in {folder}: {_STATE} is missing")
    groups = {f.stem: read_tensors(f) for f in folder.glob("*.safetensors") if not f.stem.startswith("rng-")}
    return groups, json.loads((folder / _STATE).read_text(encoding="utf-8"))


@torch.no_grad()
def restore_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put trainable weights back. Raises ReftError when they belong to another model."""
    parameters = trainable(model)
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())[0]
        raise ReftError(f"the checkpoint was written by another configuration: {odd} is in only one of them")
    for name, parameter in parameters.items():
        parameter.copy_(_like(weights[name], parameter))


def restore_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, moments: Mapping[str, Tensor]) -> None:
    """Put the optimiser's moments back."""
    for name, parameter in trainable(model).items():
        stored = {key[len(name) + 1 :]: value for key, value in moments.items() if key.startswith(f"{name}.")}
        optimizer.state[parameter] = {
            key: value if value.ndim == 0 else _like(value, parameter) for key, value in stored.items()
        }


def restore_rng(folder: Path, rank: int) -> None:
    """Continue this rank's random numbers; a rank that the checkpoint did not know keeps its fresh seed."""
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
    """Put weights, optimiser and random numbers back; returns the checkpoint for what is a loop's own.

    `inputs` identify what the loop reads, by what people call it. Raises ReftError when the checkpoint was written by
    another configuration or from other inputs.
    """
    groups, state = read_state(folder)
    if state["config"] != config.model_dump(mode="json"):
        raise ReftError(f"{folder} was written by another configuration: choose a new run id or remove it")
    # An earlier release noted none: a run that it began goes on.
    noted = state.get("inputs", {})
    for name, value in inputs.items():
        if noted.get(name, value) != value:
            raise ReftError(f"{folder} was written with another {name}: choose a new run id or remove it")
    restore_weights(model, groups["weights"])
    restore_optimizer(model, optimizer, groups["optimizer"])
    restore_rng(folder, rank)
    return groups, state
