from concurrent.futures import ThreadPoolExecutor

from reft_ray.hf.loading import load_base


def test_models_loaded_concurrently_all_have_their_weights(llama):
    expected = load_base(str(llama)).model.state_dict()
    with ThreadPoolExecutor(8) as pool:
        bases = list(pool.map(load_base, [str(llama)] * 48))
    for base in bases:
        state = base.model.state_dict()
        assert state.keys() == expected.keys()
        assert all(state[name].equal(tensor) for name, tensor in expected.items())
