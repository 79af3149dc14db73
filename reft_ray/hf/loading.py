"""Base models and tokenizers from local paths or hub ids; safetensors only, no remote code, signed where asked for."""

from __future__ import annotations

import hashlib
import json
import math
import threading
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import logging as transformers_logging
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from reft_ray.core.errors import ReftError, UsageError, first_line
from reft_ray.hf.compute import default_device, keep_freed_memory
from reft_ray.hf.model_store import local_name
from reft_ray.hf.signatures import verify_if_asked

# Users read one line per error; transformers' progress bars and warnings are noise.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

# Fields of config.json about the software or the training run, not about what the weights compute.
_IGNORED_FIELDS = {"transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache", "architectures"}
_SAMPLE_BYTES = 4096

# While transformers builds a model it disables initialisation for the whole process: of two built concurrently, one is
# left without weights.
_BUILD_LOCK = threading.Lock()


@dataclass(frozen=True, slots=True)
class Base:
    """A base model with its tokenizer. `fingerprint` identifies the weights, not the path."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return int(text_config(self.model).num_hidden_layers)

    @property
    def width(self) -> int:
        """Width of the hidden features."""
        return int(text_config(self.model).hidden_size)

    @property
    def context(self) -> int:
        """The longest input in tokens."""
        return _context(text_config(self.model))


def text_config(model: PreTrainedModel) -> Any:
    """The configuration of the language model, which may be part of a multimodal one."""
    return model.config.get_text_config()


def _context(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or 2**31)


def context_of(name: str) -> int:
    """The longest input of a base model in tokens, from its configuration alone. Raises ReftError."""
    return _context(_config(name).get_text_config())


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model. Raises ReftError if there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(_verified(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ReftError(f"no tokenizer in {name}: {first_line(error)}") from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_base(
    name: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attention: str | None = None,
    four_bit: bool = False,
) -> Base:
    """Load a causal language model and its tokenizer; on the device `meta` its shapes alone.

    With `four_bit` its linear layers are quantised (NF4, as in QLoRA), which needs CUDA and bitsandbytes.

    Raises ReftError, in one line, for a missing path, a model that is not a causal LM, or weights that are not
    safetensors.
    """
    config = _config(name)
    if config.get_text_config().model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ReftError(f"{name} is a {config.model_type} model, not a causal language model")
    keep_freed_memory()
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if torch.device(device).type == "meta":
        with _BUILD_LOCK, torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False, **options)
    elif four_bit:
        options |= {"quantization_config": _nf4(), "device_map": {"": torch.device(device)}}
        model = _load(AutoModelForCausalLM, name, "a causal language model", dtype=dtype, **options)
    else:
        model = _load(AutoModelForCausalLM, name, "a causal language model", dtype=dtype, **options)
        model.to(torch.device(device))  # type: ignore[arg-type]
    model.eval().requires_grad_(False)
    if (head := model.get_output_embeddings()) is not None:
        head.register_forward_pre_hook(_contiguous)
    return Base(name, model, load_tokenizer(name), fingerprint(name))


def _contiguous(_head: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """The LM head's input, contiguous.

    The last positions of a batch are not, and for them PyTorch computes a product per row with a copy of the head's
    weight: a hundred times as long in bfloat16 on a CPU.
    """
    return (args[0].contiguous(), *args[1:])


def _nf4() -> BitsAndBytesConfig:
    """QLoRA's quantisation (arXiv 2305.14314). Raises UsageError where it cannot run."""
    if not torch.cuda.is_available():
        raise UsageError("quantize=4bit needs a CUDA GPU, and there is none: leave it out")
    if find_spec("bitsandbytes") is None:
        raise UsageError("quantize=4bit needs bitsandbytes: pip install 'reft-ray[gpu]'")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def load_classifier(
    name: str, device: torch.device | str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A sequence classifier and its tokenizer, on `device` or the default device.

    Raises ReftError for a path without a sequence classifier in safetensors.
    """
    model = _load(AutoModelForSequenceClassification, name, "a sequence classifier")
    model.to(torch.device(device or default_device())).eval()  # type: ignore[arg-type]
    return model, load_tokenizer(name)


def _load(kind: Any, name: str, what: str, **options: Any) -> PreTrainedModel:
    try:
        with _BUILD_LOCK:
            model: PreTrainedModel = kind.from_pretrained(
                _verified(name), use_safetensors=True, trust_remote_code=False, **options
            )
    except (OSError, ValueError, KeyError) as error:
        raise ReftError(f"cannot load {name} as {what} from safetensors: {first_line(error)}") from None
    return model


def _verified(name: str) -> str:
    """The path or hub id of a model, whose signature was checked if that is asked for."""
    found = local_name(name)
    verify_if_asked(found)
    return found


def _config(name: str) -> Any:
    path = Path(name)
    if (path.is_absolute() or name.startswith(".")) and not path.is_dir():
        raise ReftError(f"no base model at {name}: the directory does not exist")
    try:
        return AutoConfig.from_pretrained(_verified(name), trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ReftError(f"no base model at {name}: {first_line(error)}") from None


def fingerprint(name: str) -> str:
    """An id of weights and architecture: SHA-256 over the configuration and the first 4 KiB of every tensor.

    These differ between two training states, at a cost that does not grow with the model's size. It detects mistakes,
    not forgery.
    """
    digest = hashlib.sha256()
    config = {k: v for k, v in _config(name).to_dict().items() if k not in _IGNORED_FIELDS}
    digest.update(json.dumps(config, sort_keys=True, default=str).encode())
    for file in _weight_files(name):
        with safe_open(file, framework="pt") as tensors:
            for key in sorted(tensors.keys()):
                view = tensors.get_slice(key)
                shape = view.get_shape()
                digest.update(f"{key}{shape}{view.get_dtype()}".encode())
                digest.update(_sample(view, shape))
    return digest.hexdigest()[:16]


def _sample(view: Any, shape: list[int]) -> bytes:
    if not shape:
        return bytes(view[...].reshape(1).view(torch.uint8).numpy())
    rows = max(1, _SAMPLE_BYTES // max(1, 4 * math.prod(shape[1:])))
    head = view[:rows].contiguous().reshape(-1).view(torch.uint8)
    return bytes(head[:_SAMPLE_BYTES].numpy())


def _weight_files(name: str) -> list[Path]:
    folder = Path(_verified(name))
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(name, local_files_only=True))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ReftError(f"no safetensors weights in {folder}: pickle files are not read; convert them to safetensors")
    return files
