"""LoRA adapters on one shared base: attach, switch, merge, save.

Teacher and student of a job are two adapters on the same weights, so a job never holds two copies of the base.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import Any, TypeGuard

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.helpers import rescale_adapter_scale
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_ray.core.errors import ReftError
from reft_ray.hf.machine import layer_of

ADAPTER_WEIGHTS = "adapter_model.safetensors"
BASE_ROW = "__base__"
"""PEFT's name for no adapter, in a pass in which each row has its own."""


@dataclass(frozen=True, slots=True)
class LoraSettings:
    """Low-rank adapters on linear layers of the decoder: all of them, or those of `attention` or the `mlp`.

    `scale` is alpha / rank; with `rslora` the product is scaled by alpha / sqrt(rank) (arXiv 2312.03732). The layers
    below `first_layer` (from 1) stay as they are, so that no backward pass runs through them. With `head` the LM head
    has an adapter too, or, with the targets `none`, it alone. In a mixture of experts only attention has adapters:
    those of experts could not be mixed in a batch.
    """

    rank: int = 16
    scale: float = 2.0
    dropout: float = 0.0
    targets: str = "all-linear"
    rslora: bool = False
    first_layer: int = 1
    head: bool = False

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0.0 <= self.dropout < 1.0:
            raise ReftError(f"LoRA needs rank >= 1 and dropout in [0, 1), got rank={self.rank}, dropout={self.dropout}")


def attach(model: nn.Module, name: str, settings: LoraSettings, seed: int = 0) -> PeftModel:
    """Add a new trainable adapter and activate it; the same seed gives the same adapter."""
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.rank * settings.scale,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=_target_modules(model, settings),
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng(), warnings.catch_warnings():
        # The head's adapter adds to its output; the embeddings whose weights it may share stay as they are.
        warnings.filterwarnings("ignore", ".*tie_word_embeddings")
        torch.manual_seed(seed)
        if isinstance(model, PeftModel):
            model.add_adapter(name, config)
            wrapped = model
        else:
            wrapped = get_peft_model(model, config, adapter_name=name)
    return activate(wrapped, name, trainable=True)


_EXPERTS = re.compile(r"(^|\.)experts\.")
_ATTENTION = re.compile(r"(^|\.)(self_attn|attention|attn|self_attention|linear_attn|mixer)\.")


def _target_modules(model: nn.Module, settings: LoraSettings) -> str | list[str]:
    """PEFT's name for every linear layer but the head, or the full names of some of them.

    Of a multimodal model those of its language model alone. Raises ReftError if no layer is left.
    """
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = bare.get_decoder() if isinstance(bare, PreTrainedModel) else bare
    head = bare.get_output_embeddings() if isinstance(bare, PreTrainedModel) else None
    head_name = next((name for name, module in bare.named_modules() if head is not None and module is head), "")
    linear = [name for name, module in bare.named_modules() if isinstance(module, nn.Linear)]
    # Adapters that are there already: not theirs, but the layers that they wrap.
    names = [name.removesuffix(".base_layer") for name in linear if ".lora_" not in name]
    names = [name for name in names if name != head_name]
    if settings.targets == "none":
        return [head_name] if settings.head and head_name else []
    prefix = next((name for name, module in bare.named_modules() if module is decoder), "")
    found = [name for name in names if name.startswith(prefix)]
    mixture = any(_EXPERTS.search(name) for name, _ in decoder.named_parameters())
    if mixture:
        # PEFT takes the names of other layers, and "all-linear", for those of the experts and their router.
        found = [name for name in found if _ATTENTION.search(name)]
    if settings.targets != "all-linear":
        found = [name for name in found if bool(_ATTENTION.search(name)) == (settings.targets == "attention")]
    if settings.first_layer > 1:
        numbers = {name: layer_of(name) for name in found}
        found = [name for name, number in numbers.items() if number is not None and number + 1 >= settings.first_layer]
    if not found:
        raise ReftError(
            f"{type(bare).__name__} has no linear layer for lora.targets={settings.targets}, "
            f"lora.first_layer={settings.first_layer}"
        )
    if settings.head and head_name:
        return [*found, head_name]
    return found if mixture or len(found) < len(names) else "all-linear"


def attach_saved(model: nn.Module, name: str, folder: Path, trainable: bool = False) -> PeftModel:
    """Add an adapter from its directory. Raises ReftError if the directory holds no adapter in safetensors."""
    _check_adapter(folder)
    if isinstance(model, PeftModel):
        model.load_adapter(str(folder), adapter_name=name, is_trainable=trainable)
        wrapped = model
    else:
        wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=name, is_trainable=trainable)
    return activate(wrapped, name, trainable)


def activate(model: PeftModel, name: str, trainable: bool) -> PeftModel:
    """Activate one adapter; gradients are kept for it alone, and only if `trainable`."""
    model.set_adapter(name)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(trainable and f".{name}." in key)
    return model


@contextmanager
def using_adapter(model: PeftModel, name: str) -> Iterator[None]:
    """Activate another adapter temporarily, in evaluation mode; `requires_grad` is unchanged afterwards."""
    before = model.active_adapter
    training = model.training
    requires_grad = {key: parameter.requires_grad for key, parameter in model.named_parameters()}
    model.set_adapter(name)
    model.eval()
    try:
        yield
    finally:
        model.set_adapter(before)
        model.train(training)
        # PEFT's switch changes it.
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(requires_grad[key])


@contextmanager
def row_adapters(model: PeftModel, names: Sequence[str]) -> Iterator[None]:
    """Give row b of each pass in this block the adapter `names[b]`, or none for `BASE_ROW`.

    As PEFT's `adapter_names`, whose hooks stay on the layers after a pass that failed: each later one would fail too.
    """
    rows = list(names)

    def give(_module: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**inputs, "adapter_names": rows}

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    handles = [layer.register_forward_pre_hook(give, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def is_adapted(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether a model carries adapters."""
    return isinstance(model, PeftModel)


def scaled_adapters(model: nn.Module, share: float) -> AbstractContextManager[None]:
    """Apply adapters at a share of their scale: 0 gives the base's weights, 1 the adapted ones."""
    if share == 0 and is_adapted(model):
        disabled: AbstractContextManager[None] = model.disable_adapter()
        return disabled
    return nullcontext() if share == 1 else rescale_adapter_scale(model, share)


@torch.no_grad()
def scale_adapter(model: nn.Module, share: float) -> None:
    """Multiply what the trained adapter adds by `share`, in place."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_B." in name:
            parameter.mul_(share)


def merge(model: PeftModel, share: float = 1.0) -> PreTrainedModel:
    """Fold a share of the active adapter into the base weights and return the bare model.

    Each sum is computed in float32 and rounded once: an update of a thousandth of a bfloat16 weight would be lost in
    part at every rounding more.
    """
    with scaled_adapters(model, share):
        for module in model.modules():
            if isinstance(module, BaseTunerLayer):
                layer = module.get_base_layer()
                dtype = layer.weight.dtype
                if dtype in (torch.bfloat16, torch.float16):
                    layer.to(torch.float32)
                    module.merge()
                    layer.to(dtype)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            merged: PreTrainedModel = model.merge_and_unload()
    return merged.requires_grad_(False).eval()


def adapter_state(model: PeftModel, name: str) -> dict[str, Tensor]:
    """One adapter's tensors, on the CPU."""
    # Not the head's own weights, which an adapter on the head does not change.
    state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: tensor.detach().cpu().contiguous() for key, tensor in state.items()}


def differing(model: PeftModel, name: str, state: Mapping[str, Tensor]) -> str | None:
    """The first tensor that this adapter or `state` has alone or in another shape; None where `state` fits."""
    mine = adapter_state(model, name)
    odd = [key for key in mine.keys() | state.keys() if key not in mine or key not in state]
    odd += [key for key in mine if key in state and mine[key].shape != state[key].shape]
    return min(odd, default=None)


def load_adapter_state(model: PeftModel, name: str, state: dict[str, Tensor]) -> None:
    """Load tensors into an attached adapter."""
    set_peft_model_state_dict(model, state, adapter_name=name)


def adapter_scale(model: PeftModel, name: str) -> float:
    """The factor of an adapter's low-rank product: alpha / rank."""
    return _scale(model.peft_config[name])


def saved_scale(folder: Path) -> float:
    """The scale of an adapter directory."""
    return _scale(LoraConfig.from_pretrained(str(folder)))


def _scale(config: PeftConfig) -> float:
    rank: int = config.r  # type: ignore[attr-defined]
    return float(config.lora_alpha / (sqrt(rank) if config.use_rslora else rank))  # type: ignore[attr-defined]


def save_adapter(
    model: PeftModel, name: str, folder: Path, base_name: str, tensors: dict[str, Tensor] | None = None
) -> None:
    """Write one adapter as a PEFT directory that plain `peft` loads.

    `tensors` are its parameters by name if they were gathered from shards; otherwise the model's are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if tensors is None:
        tensors = adapter_state(model, name)
    else:
        tensors = {key.replace(f".{name}.", "."): tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[name]
    config.base_model_name_or_path = base_name
    config.inference_mode = True
    config.save_pretrained(str(folder))


def read_adapter(folder: Path) -> dict[str, Tensor]:
    """The tensors of an adapter directory."""
    _check_adapter(folder)
    return load_file(folder / ADAPTER_WEIGHTS)


def fitted(saved: Mapping[str, Tensor], like: Mapping[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """The tensors of `like` with the update of a saved adapter, `ratio` * B A, on the layers that both have.

    A higher rank keeps the rest of `like`'s A, times a B of 0; a lower one takes the best approximation.
    """
    found = dict(like)
    for name, other in _factors(saved):
        if name not in like:
            continue
        a_RI, b_OR = saved[name].float(), ratio * saved[other].float()
        if len(like[name]) < len(a_RI):
            a_RI, b_OR = _truncated(a_RI, b_OR, len(like[name]))
        found[name], found[other] = like[name].clone(), torch.zeros_like(like[other])
        found[name][: len(a_RI)] = a_RI
        found[other][:, : len(a_RI)] = b_OR
    return found


def _truncated(a_RI: Tensor, b_OR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of the product nearest to B A of this rank, found without the product."""
    out, left = torch.linalg.qr(b_OR)
    inner, right = torch.linalg.qr(a_RI.T)
    u, s, vh = torch.linalg.svd(left @ right.T)
    root = s[:rank].sqrt()
    return (root[:, None] * vh[:rank]) @ inner.T, out @ (u[:, :rank] * root)


def _factors(tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """The names of the two factors of each layer's update, A and B."""
    for name in tensors:
        if name.endswith(".lora_A.weight"):
            yield name, name.replace(".lora_A.", ".lora_B.")


def weight_deltas(folder: Path) -> dict[str, Tensor]:
    """What an adapter adds to each linear layer of its base, [outputs, inputs] by the layer's name, in float32."""
    tensors, scale = read_adapter(folder), saved_scale(folder)
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"): scale
        * (tensors[other].float() @ tensors[name].float())
        for name, other in _factors(tensors)
    }


def _check_adapter(folder: Path) -> None:
    if not (folder / ADAPTER_WEIGHTS).is_file():
        raise ReftError(f"no adapter in {folder}: {ADAPTER_WEIGHTS} is missing")
