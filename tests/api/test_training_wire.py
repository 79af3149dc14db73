"""The binary messages: what they refuse, and that the public client reads and writes the same bytes."""

import math

import numpy as np
import pytest

from reft_ray.api.training_wire import _CLASSES, Sample, read_request, write_output, write_samples
from reft_ray.core.errors import ReftError


def message(tokens=(1, 2), targets=(2, 3), weights=(1.0, 1.0), **fields):
    made = _CLASSES["ForwardBackwardRequest"](model_id="m", seq_id=3, loss_fn="cross_entropy", **fields)
    datum = made.data.add()
    datum.model_input.add().encoded_text.tokens = np.array(tokens, np.int32).tobytes()
    for name, values, dtype in (("target_tokens", targets, np.int64), ("weights", weights, np.float32)):
        array = np.array(values, dtype)
        tensor = datum.loss_fn_inputs[name]
        tensor.dense, tensor.dtype = array.tobytes(), 2 if dtype is np.int64 else 1
        tensor.shape.extend(array.shape)
    return made


def test_a_request_is_read():
    found = read_request(message(forward_only=True).SerializeToString())
    assert (found.model_id, found.number, found.loss, found.forward_only) == ("m", 3, "cross_entropy", True)
    (datum,) = found.data
    assert datum.tokens.tolist() == [1, 2]
    assert datum.targets.tolist() == [2, 3]


def changed(change):
    made = message()
    change(made.data[0])
    return made


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (message(tokens=()), "no tokens"),
        (message(weights=(1.0, math.inf)), "not finite"),
        (message(weights=(1.0,)), "one value for each of the 2 tokens"),
        (message(targets=((1, 2), (3, 4))), "several targets at a position"),
        (changed(lambda datum: datum.loss_fn_inputs.pop("target_tokens")), "target_tokens"),
        (changed(lambda datum: setattr(datum.model_input.add().image, "data", b"x")), "image is not supported"),
        (changed(lambda datum: setattr(datum.model_input.add().dmel, "data", b"x")), "dmel is not supported"),
        (changed(lambda datum: setattr(datum.loss_fn_inputs["weights"], "dtype", 4)), "neither float32 nor int64"),
        (changed(lambda datum: setattr(datum.loss_fn_inputs["weights"], "dense", b"abc")), "ends inside a value"),
        (changed(lambda datum: datum.loss_fn_inputs["weights"].shape.append(3)), "2 values for the shape"),
        (changed(lambda datum: datum.loss_fn_inputs["weights"].sparse_csr.SetInParent()), "is sparse"),
        (changed(lambda datum: setattr(datum.loss_fn_inputs["target_tokens"], "dtype", 1)), "target_tokens"),
    ],
)
def test_what_cannot_be_read_is_named(made, reason):
    with pytest.raises(ReftError, match=reason):
        read_request(made.SerializeToString())


def test_bytes_that_are_no_message():
    with pytest.raises(ReftError, match="not a ForwardBackwardRequest"):
        read_request(b"\xff\xff\xff")


def test_the_public_client_writes_what_is_read_here():
    types = pytest.importorskip("tinker", reason="the public training client is not installed").types
    from tinker.proto.request_conv import forward_backward_request_to_proto

    datum = types.Datum(types.ModelInput.from_ints([1, 2, 3]), {"target_tokens": [2, 3, 4], "weights": [0.0, 1.0, 0.5]})
    request = types.ForwardBackwardRequest(
        types.ForwardBackwardInput([datum], "ppo", {"clip_low_threshold": 0.5, "kind": "a"}), "s:train:0", 7
    )
    found = read_request(forward_backward_request_to_proto(request).SerializeToString())
    assert (found.model_id, found.number, found.loss) == ("s:train:0", 7, "ppo")
    assert found.config == {"clip_low_threshold": 0.5, "kind": "a"}
    assert found.data[0].inputs["weights"].tolist() == [0.0, 1.0, 0.5]


def test_the_public_client_reads_what_is_written_here():
    pytest.importorskip("tinker", reason="the public training client is not installed")
    from tinker.proto.response_conv import deserialize_forward_backward_output, deserialize_sample_response

    arrays = [{"logprobs": np.array([-1.0, -2.0])}, {"logprobs": np.array([-3.0])}]
    output = deserialize_forward_backward_output(write_output(arrays, {"loss:sum": 2.0}))
    assert [each["logprobs"].data for each in output.loss_fn_outputs] == [[-1.0, -2.0], [-3.0]]
    assert output.metrics == {"loss:sum": 2.0}
    assert deserialize_forward_backward_output(write_output([], {})).loss_fn_outputs == []
    samples = deserialize_sample_response(
        write_samples([Sample([5, 6], [-0.5, -0.25], True), Sample([7], [-1.0], False)], [math.nan, -2.0])
    )
    assert [(s.tokens, s.logprobs, s.stop_reason) for s in samples.sequences] == [
        ([5, 6], [-0.5, -0.25], "stop"),
        ([7], [-1.0], "length"),
    ]
    assert samples.prompt_logprobs == [None, -2.0]
