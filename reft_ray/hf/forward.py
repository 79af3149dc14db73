"""Forward passes of a Hugging Face model for the method: logits only where they are learned, features at layer l.

Shape suffixes: B rows, T tokens, N labelled positions, D width, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_ray.core.batch import Batch
from reft_ray.core.errors import ReftError
from reft_ray.core.refusal import prompt_feature
from reft_ray.hf.loading import text_config


class _StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Leaves the model once the last wanted layer has run."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of any architecture, wrapped by PEFT or not. Raises ReftError if none is found."""
    depth = text_config(_unwrapped(model)).num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    # Mixture-of-experts models may hold other lists of that length, but below the decoder layers.
    if not found:
        raise ReftError(f"cannot find the {depth} decoder layers of {type(model).__name__}")
    return found[0]


def attention_blocks(model: nn.Module) -> list[nn.Module]:
    """The attention block of every decoder layer, or the layer itself if it has no `self_attn`."""
    return [getattr(layer, "self_attn", layer) for layer in decoder_layers(model)]


def _unwrapped(model: nn.Module) -> PreTrainedModel:
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(bare, PreTrainedModel):
        raise ReftError(f"{type(bare).__name__} is not a Hugging Face model")
    return bare


def recompute_above(model: nn.Module, tokens: int) -> None:
    """Keep no activations of training passes of more than `tokens` tokens: their backward pass computes them again."""
    bare = _unwrapped(model)
    if not bare.supports_gradient_checkpointing:
        return
    bare.activation_checkpointing_enable({"use_reentrant": False})
    layers = [module for module in bare.modules() if getattr(module, "gradient_checkpointing", False)]

    def switch(_model: nn.Module, _args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        for layer in layers:
            layer.gradient_checkpointing = inputs["input_ids"].numel() > tokens

    bare.register_forward_pre_hook(switch, with_kwargs=True)


def hidden_of(output: Any) -> Tensor:
    """The hidden states that a decoder layer returned, [B, T, D]; older architectures return them in a tuple."""
    hidden: Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextmanager
def captured_layer(model: nn.Module, layer: int, stop: bool) -> Iterator[list[Tensor]]:
    """Collect the output of decoder layer `layer` (1-based: `hidden_states[layer]`); optionally run no further.

    Raises ReftError for a layer that the model does not have.
    """
    layers = decoder_layers(model)
    if not 1 <= layer <= len(layers):
        raise ReftError(f"layer {layer} does not exist: the model has layers 1 to {len(layers)}")
    captured: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        captured.append(hidden_of(output))
        if stop:
            raise _StopForward

    handle = layers[layer - 1].register_forward_hook(hook)
    try:
        yield captured
    except _StopForward:
        pass
    finally:
        handle.remove()


class TruncatedModel:
    """A model that ends after the last of `layers`. Several threads may call it at once."""

    def __init__(self, model: nn.Module, layers: Sequence[int]) -> None:
        self._model = model
        self._call = threading.local()
        for number in layers:
            decoder_layers(model)[number - 1].register_forward_hook(
                partial(self._capture, number, number == max(layers))
            )

    def __call__(self, **inputs: Any) -> dict[int, Tensor]:
        """The output of each layer, [B, T, D]; `inputs` are the model's own."""
        self._call.hidden = {}
        try:
            self._model(**inputs)
        except _StopForward:
            return dict(self._call.hidden)
        raise ReftError(f"{type(self._model).__name__} does not run its decoder layers in order")

    def _capture(self, number: int, last: bool, _module: nn.Module, _args: Any, output: Any) -> None:
        self._call.hidden[number] = hidden_of(output)
        if last:
            raise _StopForward


@contextmanager
def _logits_only_at(model: nn.Module, where_BT: Tensor) -> Iterator[None]:
    """Let the LM head see the chosen positions only: [1, N, D] instead of [B, T, D].

    Vocabulary logits dominate memory; what an architecture does after its head (scaling, soft capping) is
    elementwise and does not change.
    """
    head = _unwrapped(model).get_output_embeddings()
    if head is None:
        raise ReftError(f"{type(model).__name__} has no LM head")

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0][where_BT].unsqueeze(0), *args[1:])

    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class ModelForward:
    """`core.forward.Forward` for any Hugging Face causal LM, bare or wrapped by PEFT."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def logits(self, batch: Batch) -> Tensor:
        """Logits at the labelled positions alone, [N, V]."""
        with _logits_only_at(self.model, batch.loss_mask_BT):
            logits: Tensor = self._run(batch).logits
        return logits[0]

    def features(self, batch: Batch, layer: int) -> Tensor:
        """Hidden states of the last prompt tokens after decoder layer `layer`, [B, D]; later layers are not run."""
        with captured_layer(self.model, layer, stop=True) as captured:
            self._run(batch)
        return prompt_feature(captured[0], batch.last_prompt_index_B)

    def logits_and_features(self, batch: Batch, layer: int) -> tuple[Tensor, Tensor]:
        """Both, from one pass."""
        with captured_layer(self.model, layer, stop=False) as captured:
            logits_NV = self.logits(batch)
        return logits_NV, prompt_feature(captured[0], batch.last_prompt_index_B)

    def _run(self, batch: Batch) -> Any:
        return self.model(input_ids=batch.ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
