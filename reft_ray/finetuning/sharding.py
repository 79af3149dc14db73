"""FSDP2: the weights of one model over the memory of all ranks, and checkpoints that each rank writes its part of.

Each pass of the model gathers its layers on all ranks at once, so that ranks run equally many passes, of the same kind
and in the same order. Checkpoints are those of `torch.distributed.checkpoint` in safetensors, so that another number of
ranks, or one process alone, reads them.
"""

from __future__ import annotations

import warnings
from functools import wraps
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from reft_ray.core.batch import Batch, dummy_batch
from reft_ray.finetuning.runtime import Runtime
from reft_ray.hf.forward import StopForward, bare_model, decoder_layers

SHARDS = "shards"
"""Folder of a checkpoint that every rank writes its part of."""


@torch.no_grad()
def shard(model: nn.Module, rank: int, device: torch.device, dtype: torch.dtype) -> None:
    """Shard a model in place, a unit per decoder layer, and move it to the ranks' devices.

    Rank 0 has its weights in the memory of the host, the others their shapes alone. Products are computed in `dtype`,
    gradients are summed in float32 and not averaged, because the loss already holds the global counts.
    """
    whole = dict(model.state_dict(keep_vars=True)) if rank == 0 else {}
    buffers = dict(model.named_buffers()) if rank == 0 else {}
    model.to("meta")
    bare_model(model).tie_weights()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for unit in (*decoder_layers(model), model):
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # gloo has no sum that is scaled on the way.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
    model.to_empty(device=device)
    bare_model(model).tie_weights()
    for name, parameter in model.named_parameters():
        full = _from_rank_0(whole.get(name), parameter, device)
        assert isinstance(parameter, DTensor)
        local = distribute_tensor(full, mesh, parameter.placements, src_data_rank=None)
        parameter.to_local().copy_(local.to_local())
    for name, buffer in model.named_buffers():
        buffer.copy_(_from_rank_0(buffers.get(name), buffer, device))
    _end_early_passes(model)
    _generate_on_all_ranks(model)


def _end_early_passes(model: nn.Module) -> None:
    """End a pass that stops at a layer within the forward of the root, as FSDP's hooks need."""
    forward = model.forward

    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        except StopForward:
            return None

    model.forward = run


def _generate_on_all_ranks(model: nn.Module) -> None:
    """Let `generate` gather the weights of the root, and end on all ranks at the same token."""
    register_fsdp_forward_method(model, "generate")
    # What transformers sets on models that it shards itself.
    bare_model(model)._is_fsdp_managed_module = True  # type: ignore[assignment]


def is_sharded(model: nn.Module) -> bool:
    """Whether `shard` spread this model."""
    return isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Free the weights outside of the layers, which a pass without a gradient leaves gathered."""
    if isinstance(model, FSDPModule):
        model.reshard()


def most_of_ranks(count: int, runtime: Runtime) -> int:
    """The largest of all ranks' counts."""
    counts = torch.zeros(runtime.world_size, dtype=torch.float64)
    counts[runtime.rank] = count
    return int(runtime.all_reduce(counts).max())


def as_many_as_others(batches: list[Batch], pad_id: int, runtime: Runtime) -> list[Batch]:
    """A rank's micro-batches, and dummy ones up to the number of the rank with the most."""
    missing = most_of_ranks(len(batches), runtime) - len(batches)
    return batches + [dummy_batch(pad_id, runtime.device)] * missing


def _from_rank_0(tensor: Tensor | None, like: Tensor, device: torch.device) -> Tensor:
    """Rank 0's tensor on every rank's device."""
    shape, dtype = like.shape, like.dtype
    moved = torch.empty(shape, dtype=dtype, device=device) if tensor is None else tensor.detach().to(device, dtype)
    moved = moved.contiguous()
    dist.broadcast(moved, 0)
    return moved


def save_shards(folder: Path, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Write weights and optimiser state; every rank calls it and writes its own files."""
    writer = HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True)
    save(_state(weights, optimizer), storage_writer=writer)


def load_shards(folder: Path, weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Read them into sharded or whole parameters; every rank calls it."""
    for parameter in weights.values():
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.zeros(()), **moments}
    reader = HuggingFaceStorageReader(str(folder / SHARDS))
    state = _state(weights, optimizer)
    with warnings.catch_warnings():
        # One process that resumes what several wrote is meant.
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        load(state, storage_reader=reader, no_dist=not dist.is_initialized())
    for name, parameter in weights.items():
        optimizer.state[parameter]["step"] = state[f"optimizer.{name}.step"].reshape(())


def _state(weights: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {f"weights.{name}": parameter.detach() for name, parameter in weights.items()}
    for name, parameter in weights.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            # A safetensors slice needs a dimension.
            found[f"optimizer.{name}.{key}"] = value.reshape(1) if value.ndim == 0 else value
    return found
