"""Edits of rows and weights, against loops written out."""

import pytest
import torch
from torch import nn

from reft_ray.baselines.antidote import antidote, input_norms
from reft_ray.baselines.larf import danger, kept_rows
from reft_ray.baselines.safe_instruct import safe_instruct
from reft_ray.baselines.safe_lora import safe_lora
from reft_ray.core.conversation import Example, Label, chat

GENERATOR = torch.Generator().manual_seed(0)


def test_safe_lora_keeps_what_moves_as_alignment_did_and_projects_what_does_not() -> None:
    direction_O, reading_I = torch.randn(6, generator=GENERATOR), torch.randn(4, generator=GENERATOR)
    aligned_OI = torch.outer(direction_O, reading_I)
    along, projected = safe_lora(aligned_OI, 0.3 * aligned_OI, 0.5)
    assert not projected
    assert torch.equal(along, 0.3 * aligned_OI)
    across_O = torch.randn(6, generator=GENERATOR)
    across_O -= direction_O * (across_O @ direction_O) / direction_O.square().sum()
    removed, projected = safe_lora(aligned_OI, torch.outer(across_O, reading_I), 0.5)
    assert projected
    torch.testing.assert_close(removed, torch.zeros_like(removed), atol=1e-5, rtol=0)
    update_OI = torch.randn(6, 4, generator=GENERATOR)
    edited, projected = safe_lora(aligned_OI, update_OI, 1.0)
    assert projected
    torch.testing.assert_close(edited, (aligned_OI @ aligned_OI.T / aligned_OI.norm()) @ update_OI)


def test_safe_lora_drops_the_update_of_a_layer_that_alignment_never_moved() -> None:
    edited, projected = safe_lora(torch.zeros(3, 2), torch.ones(3, 2), 0.5)
    assert projected
    assert not edited.any()


def test_antidote_takes_out_the_largest_scores_of_each_row() -> None:
    update_OI, norm_I = torch.randn(5, 10, generator=GENERATOR), torch.rand(10, generator=GENERATOR)
    edited = antidote(update_OI, norm_I, 0.2)
    for row, before in zip(edited, update_OI, strict=True):
        scores = [abs(float(weight)) * float(norm) for weight, norm in zip(before, norm_I, strict=True)]
        worst = sorted(range(10), key=scores.__getitem__)[-2:]
        for column in range(10):
            assert float(row[column]) == (0.0 if column in worst else float(before[column]))
    assert torch.equal(antidote(update_OI, norm_I, 0.0), update_OI)


def test_input_norms_are_those_of_everything_that_was_read() -> None:
    layer, unused = nn.Linear(3, 2), nn.Linear(3, 2)
    inputs = [torch.randn(2, 4, 3, generator=GENERATOR), torch.randn(1, 5, 3, generator=GENERATOR)]
    with input_norms({"layer": layer, "unused": unused}) as norms:
        for value in inputs:
            layer(value)
    assert norms.keys() == {"layer"}
    torch.testing.assert_close(norms["layer"], torch.cat([v.flatten(0, 1) for v in inputs]).norm(dim=0))
    layer(inputs[0])
    assert not layer._forward_pre_hooks


def test_danger_is_the_mean_cosine_to_unsafe_less_that_to_safe_references() -> None:
    rows_BD, unsafe_KD, safe_KD = (torch.randn(n, 6, generator=GENERATOR) for n in (4, 3, 5))
    for found, row in zip(danger(rows_BD, unsafe_KD, safe_KD), rows_BD, strict=True):
        unsafe, safe = (
            sum(float(torch.cosine_similarity(row, reference, dim=0)) for reference in references) / len(references)
            for references in (unsafe_KD, safe_KD)
        )
        assert float(found) == pytest.approx(unsafe - safe, abs=1e-5)


@pytest.mark.parametrize(("share", "kept"), [(0.0, [0, 1, 2, 3, 4]), (0.4, [0, 2, 4]), (1.0, [])])
def test_the_most_dangerous_share_is_dropped(share: float, kept: list[int]) -> None:
    assert kept_rows(torch.tensor([0.1, 0.9, -1.0, 0.5, 0.2]), share) == kept


def test_safe_instruct_mixes_a_tenth_of_refusals_in() -> None:
    user = [Example(chat(f"question {i}", "answer"), Label.HARMLESS) for i in range(30)]
    refusals = [Example(chat(f"harm {i}", "no"), Label.HARMFUL) for i in range(2)]
    mixed = safe_instruct(user, refusals, 0.1, 0)
    assert len(mixed) == 33
    assert [row for row in mixed if row.label is Label.HARMLESS] != user
    assert sorted(row.prompt[-1].content for row in mixed if row.label is Label.HARMLESS) == sorted(
        row.prompt[-1].content for row in user
    )
    assert mixed == safe_instruct(user, refusals, 0.1, 0) != safe_instruct(user, refusals, 0.1, 1)
