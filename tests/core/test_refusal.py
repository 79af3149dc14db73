import pytest
import torch

from reft_ray.core.refusal import ClassSums, RunningRefusal, prompt_feature, refusal_score


def rows(count: int = 20, width: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, width, generator=generator), torch.arange(count) % 3 - 1


def test_the_feature_is_that_of_each_rows_last_prompt_token() -> None:
    hidden = torch.arange(2 * 4 * 3).reshape(2, 4, 3).float()
    assert torch.equal(prompt_feature(hidden, torch.tensor([1, 3])), torch.stack([hidden[0, 1], hidden[1, 3]]))


def test_the_refusal_feature_is_the_difference_of_class_means_in_any_split() -> None:
    features, labels = rows()
    expected = features[labels == 1].mean(0) - features[labels == 0].mean(0)
    whole = ClassSums(features, labels)
    one, other = ClassSums(features[:5], labels[:5]), ClassSums(features[5:], labels[5:])
    reduced = one.reduced(lambda tensor: tensor + other._sums)
    assert torch.allclose(whole.refusal(), expected, atol=1e-6)
    assert torch.equal(reduced.refusal(), whole.refusal())
    assert torch.equal((one + other).refusal(), whole.refusal())
    assert reduced.counts == (7, 6)


def test_one_class_alone_gives_no_refusal_feature() -> None:
    sums = ClassSums(rows()[0], torch.ones(20))
    with pytest.raises(ValueError, match=r"both classes, got \(harmless, harmful\) = \(0, 20\)"):
        sums.refusal()


def test_the_running_feature_is_an_average_of_class_means_and_keeps_an_absent_class() -> None:
    features, labels = rows()
    first = ClassSums(features, labels)
    second = ClassSums(features[labels == 1] + 1.0, torch.ones(int((labels == 1).sum())))
    running = RunningRefusal(decay=0.75)
    assert running.refusal_D is None
    running.update(first)
    running.update(second)
    harmful = 0.75 * features[labels == 1].mean(0) + 0.25 * (features[labels == 1] + 1).mean(0)
    assert running.refusal_D is not None
    assert torch.allclose(running.refusal_D, harmful - features[labels == 0].mean(0), atol=1e-6)
    restored = RunningRefusal(0.75)
    restored.load_state_dict(running.state_dict())
    assert torch.equal(restored.refusal_D, running.refusal_D)


def test_the_score_is_a_cosine_in_float32() -> None:
    feature = torch.tensor([[3.0, 4.0], [-3.0, -4.0], [4.0, -3.0]], dtype=torch.bfloat16)
    score = refusal_score(feature, torch.tensor([6.0, 8.0]))
    assert score.dtype == torch.float32
    assert torch.allclose(score, torch.tensor([1.0, -1.0, 0.0]), atol=1e-6)
