"""The binary messages of the training API: requests of data, and results with tensors, in protobuf.

The messages are declared here as the public client declares them (package `tinker_public`), in a pool of their own, so
that the client may be in the same process.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError

from reft_ray.core.errors import ReftError

PROTOBUF = "application/x-protobuf"
Array = npt.NDArray[Any]

_PACKAGE = "tinker_public"
_SCALARS = {"double": 1, "int64": 3, "int32": 5, "bool": 8, "string": 9, "bytes": 12, "uint32": 13}
# Message -> its fields as `number: (name, type)`; `*` repeats, `?` is optional, `a->b` is a map; `|` shares a oneof.
_MESSAGES: Mapping[str, Mapping[int, tuple[str, str]]] = {
    "SparseCsr": {1: ("values", "bytes"), 2: ("crow_indices", "bytes"), 3: ("col_indices", "bytes")},
    "Tensor": {1: ("dense", "bytes|"), 2: ("sparse_csr", "SparseCsr|"), 3: ("dtype", "int32"), 4: ("shape", "int64*")},
    "BatchedTensor": {
        1: ("data", "bytes"),
        2: ("offsets", "bytes"),
        3: ("dtype", "int32"),
        4: ("trailing_shape", "int64*"),
    },
    "ArrayRecord": {1: ("type_tag", "string"), 2: ("fields", "string->BatchedTensor"), 3: ("num_datums", "int64")},
    "ForwardBackwardOutput": {
        1: ("loss_fn_output_type", "string"),
        2: ("loss_fn_outputs", "ArrayRecord*"),
        3: ("metrics", "string->double"),
    },
    "LossConfigValue": {1: ("number", "double|"), 2: ("text", "string|")},
    "EncodedTextChunk": {1: ("tokens", "bytes")},
    "OtherChunk": {1: ("data", "bytes")},
    "Chunk": {1: ("encoded_text", "EncodedTextChunk|"), 2: ("image", "OtherChunk|"), 3: ("dmel", "OtherChunk|")},
    "Span": {1: ("sequence_id", "string"), 2: ("offset", "int64"), 3: ("length", "int64")},
    "ProvenanceSpan": {1: ("prompt_tokens", "Span|"), 2: ("sampled_tokens", "Span|")},
    "Datum": {
        1: ("model_input", "Chunk*"),
        2: ("loss_fn_inputs", "string->Tensor"),
        3: ("model_input_spans", "ProvenanceSpan*"),
        4: ("loss_fn_input_spans", "ProvenanceSpan*"),
    },
    "ForwardBackwardRequest": {
        1: ("model_id", "string"),
        2: ("seq_id", "int32"),
        3: ("data", "Datum*"),
        4: ("loss_fn", "string"),
        5: ("loss_fn_config", "string->double"),
        6: ("forward_only", "bool"),
        7: ("loss_fn_config_v2", "string->LossConfigValue"),
    },
    "SampledSequence": {1: ("stop_reason", "int32"), 2: ("tokens", "bytes"), 3: ("logprobs", "bytes?")},
    "SampleResponse": {
        1: ("sequences", "SampledSequence*"),
        2: ("prompt_logprobs", "bytes?"),
        4: ("prompt_cache_hit_tokens", "int32"),
    },
}
_FLOAT32, _INT64 = 1, 2
_DTYPES: Mapping[int, np.dtype[Any]] = {_FLOAT32: np.dtype(np.float32), _INT64: np.dtype(np.int64)}


@dataclass(frozen=True, slots=True)
class Datum:
    """One sequence: T tokens, and per token the target and the other inputs of the loss, [T] each."""

    tokens: Array
    inputs: Mapping[str, Array]

    @property
    def targets(self) -> Array:
        """The token to predict at each position."""
        return self.inputs["target_tokens"]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, slots=True)
class DataRequest:
    """A `forward_backward` or, with `forward_only`, a `forward`."""

    model_id: str
    number: int
    loss: str
    config: Mapping[str, float | str]
    forward_only: bool
    data: Sequence[Datum] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Sample:
    """A sampled sequence: its tokens, their log-probabilities, and whether it ended by itself."""

    tokens: Sequence[int]
    logprobs: Sequence[float]
    stopped: bool


def read_head(body: bytes) -> tuple[str, int]:
    """The model and the request's number, also of a request that is refused otherwise. Raises ReftError."""
    message = _parsed("ForwardBackwardRequest", body)
    return str(message.model_id), int(message.seq_id)


def read_request(body: bytes) -> DataRequest:
    """The request. Raises ReftError, which names what is not supported."""
    message = _parsed("ForwardBackwardRequest", body)
    config: dict[str, float | str] = dict(message.loss_fn_config)
    config |= {name: getattr(value, value.WhichOneof("kind") or "number") for name, value in
               message.loss_fn_config_v2.items()}  # fmt: skip
    data = [_datum(datum, f"data[{index}]") for index, datum in enumerate(message.data)]
    return DataRequest(
        str(message.model_id), int(message.seq_id), str(message.loss_fn), config, bool(message.forward_only), data
    )


def write_output(outputs: Sequence[Mapping[str, Array]], metrics: Mapping[str, float]) -> bytes:
    """The result of a forward pass: per datum its arrays [T] by name, and the metrics, `name:reduction` each."""
    message = _CLASSES["ForwardBackwardOutput"](loss_fn_output_type="ArrayRecord", metrics=dict(metrics))
    record = message.loss_fn_outputs.add(type_tag="ArrayRecord", num_datums=len(outputs))
    for name in outputs[0] if outputs else ():
        arrays = [np.ascontiguousarray(output[name], np.float32) for output in outputs]
        tensor = record.fields[name]
        tensor.data = b"".join(array.tobytes() for array in arrays)
        tensor.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype=np.int64).tobytes()
        tensor.dtype = _FLOAT32
    found: bytes = message.SerializeToString()
    return found


def write_samples(sequences: Sequence[Sample], prompt_logprobs: Sequence[float] | None) -> bytes:
    """The result of sampling; a prompt's log-probabilities have NaN at its first token."""
    message = _CLASSES["SampleResponse"]()
    for sequence in sequences:
        message.sequences.add(
            stop_reason=0 if sequence.stopped else 1,
            tokens=np.asarray(sequence.tokens, np.int32).tobytes(),
            logprobs=np.asarray(sequence.logprobs, np.float32).tobytes(),
        )
    if prompt_logprobs is not None:
        message.prompt_logprobs = np.asarray(prompt_logprobs, np.float32).tobytes()
    found: bytes = message.SerializeToString()
    return found


def _datum(message: Any, place: str) -> Datum:
    pieces = []
    for chunk in message.model_input:
        kind = chunk.WhichOneof("kind")
        if kind != "encoded_text":
            raise ReftError(f"{place}: {kind or 'an empty chunk'} is not supported: only tokens of text are read")
        pieces.append(_array(chunk.encoded_text.tokens, np.dtype(np.int32), place))
    tokens = np.concatenate(pieces).astype(np.int64) if pieces else np.zeros(0, np.int64)
    if not len(tokens):
        raise ReftError(f"{place} has no tokens")
    inputs = {}
    for name, tensor in message.loss_fn_inputs.items():
        where = f"{place}.loss_fn_inputs[{name[:64]!r}]"
        values = _tensor(tensor, where)
        if values.shape != tokens.shape:
            raise ReftError(
                f"{where} has the shape {list(values.shape)}: one value for each of the {len(tokens)} tokens is "
                "supported, since several targets at a position cannot be judged as text"
            )
        inputs[name] = values
    if "target_tokens" not in inputs:
        raise ReftError(f"{place} has no loss_fn_inputs['target_tokens']")
    if not np.issubdtype(inputs["target_tokens"].dtype, np.integer):
        raise ReftError(f"{place}.loss_fn_inputs['target_tokens'] are not token ids")
    for name, values in inputs.items():
        if not np.isfinite(values).all():
            raise ReftError(f"{place}.loss_fn_inputs[{name[:64]!r}] has a value that is not finite")
    return Datum(tokens, inputs)


def _tensor(message: Any, place: str) -> Array:
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise ReftError(f"{place} has neither float32 nor int64 values")
    shape = list(message.shape)
    if message.WhichOneof("kind") == "sparse_csr":
        raise ReftError(f"{place} is sparse: only dense tensors of one value per token are supported")
    values = _array(message.dense, dtype, place)
    if shape and (min(shape) < 0 or int(np.prod(shape, dtype=object)) != len(values)):
        raise ReftError(f"{place} has {len(values)} values for the shape {shape[:4]}")
    return values.reshape(shape) if shape else values


def _array(data: bytes, dtype: np.dtype[Any], place: str) -> Array:
    if len(data) % dtype.itemsize:
        raise ReftError(f"{place} ends inside a value")
    return np.frombuffer(data, dtype).copy()


def _parsed(name: str, body: bytes) -> Any:
    try:
        return _CLASSES[name].FromString(body)
    except DecodeError:
        raise ReftError(f"the body is not a {name} in protobuf") from None


def _classes() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="training.proto", package=_PACKAGE, syntax="proto3")
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        if any(kind.endswith("|") for _, kind in fields.values()):
            message.oneof_decl.add(name="kind")
        for number, (title, kind) in fields.items():
            _add_field(message, number, title, kind)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = {name: pool.FindMessageTypeByName(f"{_PACKAGE}.{name}") for name in _MESSAGES}
    return {name: message_factory.GetMessageClass(descriptor) for name, descriptor in found.items()}


def _add_field(message: Any, number: int, title: str, kind: str) -> None:
    entry = None
    if "->" in kind:
        key, _, value = kind.partition("->")
        entry = "".join(part.capitalize() for part in title.split("_")) + "Entry"
        nested = message.nested_type.add(name=entry)
        nested.options.map_entry = True
        _add_field(nested, 1, "key", key)
        _add_field(nested, 2, "value", value)
        kind = f"{message.name}.{entry}*"
    field_ = message.field.add(name=title, number=number, label=3 if kind.endswith("*") else 1)
    bare = kind.rstrip("*|?")
    if bare in _SCALARS:
        field_.type = _SCALARS[bare]
    else:
        field_.type, field_.type_name = 11, f".{_PACKAGE}.{bare}"
    if kind.endswith("|"):
        field_.oneof_index = 0
    elif kind.endswith("?"):
        field_.proto3_optional = True
        field_.oneof_index = len(message.oneof_decl)
        message.oneof_decl.add(name=f"_{title}")


_CLASSES = _classes()
