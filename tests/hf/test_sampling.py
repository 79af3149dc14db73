"""Each row's next token depends on its own sampling parameters and random numbers only."""

import math
from collections import Counter

import pytest
import torch

from reft_ray.core.completion import Sampling
from reft_ray.hf.sampling import DecodingRow, next_tokens

LOGITS_V = torch.tensor([0.0, 2.0, 1.0, -1.0])


def drawn(sampling, times, logits_V=LOGITS_V):
    row = DecodingRow(sampling)
    return [next_tokens(logits_V[None], [row])[0] for _ in range(times)]


def test_temperature_zero_is_greedy():
    assert drawn(Sampling(1, temperature=0.0), 3) == [1, 1, 1]
    assert set(drawn(Sampling(1, temperature=1e-9, seed=1), 50)) == {1}


def test_sampling_follows_the_probabilities():
    counts = Counter(drawn(Sampling(1, temperature=2.0, seed=1), 4000))
    expected = (LOGITS_V / 2).softmax(0)
    for token, probability in enumerate(expected.tolist()):
        # Four standard deviations.
        assert abs(counts[token] / 4000 - probability) < 4 * math.sqrt(probability * (1 - probability) / 4000)


@pytest.mark.parametrize(("top_p", "allowed"), [(0.01, {1}), (0.6, {1}), (0.7, {1, 2}), (0.95, {0, 1, 2})])
def test_a_nucleus_is_the_fewest_tokens_that_reach_top_p(top_p, allowed):
    assert set(drawn(Sampling(1, top_p=top_p, seed=1), 500)) == allowed


def test_a_row_does_not_depend_on_the_others_in_the_batch():
    samplings = [
        Sampling(1, temperature=0.0),
        Sampling(1, temperature=1.5, seed=1),
        Sampling(1, temperature=1.5, top_p=0.9, seed=1),
        Sampling(1, seed=2, presence_penalty=1.0, frequency_penalty=0.5),
    ]
    logits_BV = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    rows = [DecodingRow(sampling) for sampling in samplings]
    together = [next_tokens(logits_BV, rows) for _ in range(20)]
    for index, sampling in enumerate(samplings):
        row = DecodingRow(sampling)
        assert [next_tokens(logits_BV[index : index + 1], [row])[0] for _ in range(20)] == [
            step[index] for step in together
        ]


def test_penalties_count_presence_once_and_frequency_each_time():
    def after(tokens, **penalties):
        row = DecodingRow(Sampling(1, temperature=0.0, **penalties))
        row.tokens += tokens
        return next_tokens(LOGITS_V[None], [row])[0]

    assert after([1], presence_penalty=0.9) == 1
    assert after([1], presence_penalty=1.1) == 2
    assert after([1, 1, 1], presence_penalty=0.9) == 1
    assert after([1], frequency_penalty=0.4) == 1
    assert after([1, 1, 1], frequency_penalty=0.4) == 2
    assert after([2], presence_penalty=-1.5) == 2
    assert LOGITS_V.tolist() == [0.0, 2.0, 1.0, -1.0]


def test_nan_logits_give_no_token():
    logits_BV = torch.stack([LOGITS_V, LOGITS_V * math.nan])
    rows = [DecodingRow(Sampling(1, temperature=0.0)), DecodingRow(Sampling(1, seed=1))]
    assert next_tokens(logits_BV, rows) == [1, None]
