"""Forward passes of a Hugging Face model for the method: logits only where they are learned, features at layer l.

Shape suffixes: B rows, T tokens, N labelled positions, D width, V vocabulary.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from reft_ray.core.batch import Batch
from reft_ray.core.errors import ReftError
from reft_ray.core.forward import Predictions
from reft_ray.hf.loading import text_config
from reft_ray.hf.packing import packed_inputs


class StopForward(Exception):  # noqa: N818 - control flow, not an error
    """Leaves the model once the last wanted layer has run."""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of any architecture, wrapped by PEFT or not. Raises ReftError if none is found.

    Of a multimodal model those of its language model: a vision tower may be as deep.
    """
    bare = bare_model(model)
    depth = text_config(bare).num_hidden_layers
    decoder = bare.get_decoder() or bare
    found = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    # Mixture-of-experts models may hold other lists of that length, but below the decoder layers.
    if not found:
        raise ReftError(f"cannot find the {depth} decoder layers of {type(model).__name__}")
    return found[0]


def attention_blocks(model: nn.Module) -> list[nn.Module]:
    """The attention block of every decoder layer, or the layer itself if it has no `self_attn`."""
    return [getattr(layer, "self_attn", layer) for layer in decoder_layers(model)]


def bare_model(model: nn.Module) -> PreTrainedModel:
    """The Hugging Face model itself, without PEFT. Raises ReftError if it is none."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    if not isinstance(bare, PreTrainedModel):
        raise ReftError(f"{type(bare).__name__} is not a Hugging Face model")
    return bare


def recompute_above(model: nn.Module, tokens: int) -> None:
    """Keep no activations of training passes of more than `tokens` tokens: their backward pass computes them again."""
    bare = bare_model(model)
    if not bare.supports_gradient_checkpointing:
        return
    # Renamed in transformers 5.20.
    enable = getattr(bare, "activation_checkpointing_enable", None) or bare.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # Transformers lets the embeddings of a model with adapters require a gradient, which reentrant checkpointing needs;
    # here it would run the backward pass through the layers below the lowest adapter.
    bare.disable_input_require_grads()
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
            raise StopForward

    handle = layers[layer - 1].register_forward_hook(hook)
    try:
        yield captured
    except StopForward:
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
        except StopForward:
            return dict(self._call.hidden)
        raise ReftError(f"{type(self._model).__name__} does not run its decoder layers in order")

    def _capture(self, number: int, last: bool, _module: nn.Module, _args: Any, output: Any) -> None:
        self._call.hidden[number] = hidden_of(output)
        if last:
            raise StopForward


@contextmanager
def _head_sees(model: nn.Module, batch: Batch, run: bool) -> Iterator[list[Tensor]]:
    """Let the LM head see the labelled positions only, [1, N, D] instead of all of them, and collect what it sees.

    With `run` False it sees no position, and its result is not used. What an architecture does after its head
    (scaling, soft capping) is elementwise and does not change.
    """
    seen: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(batch.learned(args[0]))
        return (seen[0].unsqueeze(0) if run else args[0][:, :0], *args[1:])

    handle = head_of(model).register_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def head_of(model: nn.Module) -> nn.Module:
    """The LM head. Raises ReftError for a model without one."""
    head: nn.Module | None = bare_model(model).get_output_embeddings()
    if head is None:
        raise ReftError(f"{type(model).__name__} has no LM head")
    return head


def _after_head(model: nn.Module) -> Callable[[Tensor], Tensor] | None:
    """What a model does to its head's output; None if it is none of the forms known here."""
    config = text_config(bare_model(model))
    cap = getattr(config, "final_logit_softcapping", None)
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)

    def finish(logits: Tensor) -> Tensor:
        logits = logits if scale == 1.0 else logits * scale
        return torch.tanh(logits / cap) * cap if cap else logits

    return finish if _is_known(model, finish) else None


@torch.no_grad()
def _is_known(model: nn.Module, finish: Callable[[Tensor], Tensor]) -> bool:
    """Whether `finish` turns the head's output into the model's logits, on two tokens."""
    raw: list[Tensor] = []
    handle = head_of(model).register_forward_hook(lambda _module, _args, output: raw.append(output))
    device = next(model.parameters()).device
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            logits = model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device), use_cache=False).logits
    finally:
        handle.remove()
    return torch.allclose(finish(raw[0]).float(), logits.float(), rtol=1e-2, atol=1e-3)


_FINISHES: WeakKeyDictionary[nn.Module, Callable[[Tensor], Tensor] | None] = WeakKeyDictionary()
"""By model, so that each runs its two tokens once."""


class ModelForward:
    """`core.forward.Forward` for any Hugging Face causal LM, bare or wrapped by PEFT.

    The first one of a model runs two tokens through it; under sharding every rank makes it at once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        bare = bare_model(model)
        if bare not in _FINISHES:
            _FINISHES[bare] = _after_head(model)
        self._finish = _FINISHES[bare]

    def logits(self, batch: Batch) -> Tensor:
        """Logits at the labelled positions alone, [N, V]."""
        with _head_sees(self.model, batch, run=True):
            logits: Tensor = self._run(batch).logits
        return logits[0]

    def predictions(self, batch: Batch) -> Predictions:
        """The head's input at the labelled positions, and the head."""
        if self._finish is None:
            return Predictions.of(self.logits(batch))
        with _head_sees(self.model, batch, run=False) as seen:
            self._run(batch)
        head = head_of(self.model)
        weights = tuple(parameter for parameter in head.parameters() if parameter.requires_grad)
        vocabulary = int(text_config(bare_model(self.model)).vocab_size)
        return Predictions(seen[0], partial(_finished, head, self._finish), vocabulary, weights)

    def features(self, batch: Batch, layer: int) -> Tensor:
        """Hidden states of the last prompt tokens after decoder layer `layer`, [B, D]; later layers are not run."""
        with captured_layer(self.model, layer, stop=True) as captured:
            self._run(batch)
        return batch.prompt_ends(captured[0])

    def predictions_and_features(self, batch: Batch, layer: int) -> tuple[Predictions, Tensor]:
        """Both, from one pass."""
        with captured_layer(self.model, layer, stop=False) as captured:
            predictions = self.predictions(batch)
        return predictions, batch.prompt_ends(captured[0])

    def _run(self, batch: Batch) -> Any:
        if batch.packing is not None:
            return self.model(input_ids=batch.ids_BT, use_cache=False, **packed_inputs(batch))
        return self.model(input_ids=batch.ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)


def _finished(head: nn.Module, finish: Callable[[Tensor], Tensor], hidden_ND: Tensor) -> Tensor:
    return finish(head(hidden_ND))
