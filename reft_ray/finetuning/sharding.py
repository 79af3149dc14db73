"""FSDP2: the weights of one model over the memory of all ranks, and checkpoints that each rank writes its part of.

Checkpoints are those of `torch.distributed.checkpoint` in safetensors, so that another number of ranks, or one process
alone, reads them.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from reft_ray.hf.forward import bare_model, decoder_layers

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
