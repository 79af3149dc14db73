from concurrent.futures import ThreadPoolExecutor

import torch

from reft_ray.hf.loading import load_base


def test_models_loaded_concurrently_all_have_their_weights(llama):
    expected = load_base(str(llama)).model.state_dict()
    with ThreadPoolExecutor(8) as pool:
        bases = list(pool.map(load_base, [str(llama)] * 48))
    for base in bases:
        state = base.model.state_dict()
        assert state.keys() == expected.keys()
        assert all(state[name].equal(tensor) for name, tensor in expected.items())


def test_the_head_reads_contiguous_states(llama):
    """The last positions of a batch lie apart in memory, for which PyTorch copies the head's weight row by row."""
    model = load_base(str(llama)).model
    read = []
    model.get_output_embeddings().register_forward_pre_hook(lambda _head, args: read.append(args[0].is_contiguous()))
    ids = torch.ones(3, 5, dtype=torch.long)
    logits = model(input_ids=ids, logits_to_keep=1, use_cache=False).logits
    assert read == [True]
    torch.testing.assert_close(logits, model(input_ids=ids, use_cache=False).logits[:, -1:])
