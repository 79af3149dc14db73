"""Loading base models, and the formats that they compute in."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from reft_ray.core.errors import UsageError
from reft_ray.hf.loading import load_base
from reft_ray.hf.precision import resolve_dtype


def test_models_loaded_side_by_side_all_have_their_weights(llama):
    expected = load_base(str(llama)).model.state_dict()
    with ThreadPoolExecutor(8) as pool:
        bases = list(pool.map(load_base, [str(llama)] * 48))
    for base in bases:
        state = base.model.state_dict()
        assert state.keys() == expected.keys()
        assert all(state[name].equal(tensor) for name, tensor in expected.items())


def test_a_precision_by_another_name_is_refused() -> None:
    with pytest.raises(UsageError, match="precision fp16: one of auto, float32, bfloat16"):
        resolve_dtype("fp16", "cpu")
