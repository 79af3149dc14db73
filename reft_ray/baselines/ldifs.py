"""LDIFS: finetune, and keep the features near those of the starting weights.

    min_w  L_user(w) + lambda / N * sum over labelled positions, layers  || phi_l(x; w) - phi_l(x; w_0) ||^2

phi_l: output of decoder layer l. Each step also takes a forward pass without gradients at w_0.

Source: Mukhoti et al., "Fine-tuning can cripple your foundation model; preserving features may be the solution",
arXiv 2308.13320; as a baseline of harmful finetuning with lambda 0.01.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from reft_ray.baselines.step import Step, Streams
from reft_ray.baselines.vaccine import captured
from reft_ray.core.batch import Batch
from reft_ray.core.forward import AllReduce, Forward, single_rank
from reft_ray.core.guided import GuidedTerms
from reft_ray.core.losses import cross_entropy_sum, label_counts, terms_sum


class Ldifs(Step):
    """`layers` are the modules whose outputs are compared; `parameters` the trained ones by name."""

    streams = Streams(alignment=False)

    def __init__(
        self,
        student: Forward,
        layers: Sequence[nn.Module],
        parameters: Mapping[str, nn.Parameter],
        weight: float,
        all_reduce: AllReduce = single_rank,
    ) -> None:
        self.student = student
        self.layers = layers
        self.parameters = parameters
        self.weight = weight
        self.all_reduce = all_reduce
        self.devices = {parameter.device for parameter in parameters.values() if parameter.is_cuda}
        self.start = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def __call__(self, user: Sequence[Batch], alignment: Sequence[Batch]) -> GuidedTerms:
        """The gradient of both terms; `distill` reports the distance of the features."""
        (tokens,) = label_counts(user, all_reduce=self.all_reduce)
        terms = [torch.zeros(3)]
        for batch in user:
            # The pass after it draws the same dropout masks, or the noise of two would count as distance.
            with (
                torch.random.fork_rng(self.devices),
                torch.no_grad(),
                self._at_start(),
                captured(self.layers) as anchors,
            ):
                self.student.predictions(batch)
            with captured(self.layers) as features:
                predictions = self.student.predictions(batch)
            task = cross_entropy_sum(predictions, batch.labels_N) / tokens
            gaps = [
                (batch.learned(now) - batch.learned(old)).square().sum()
                for now, old in zip(features, anchors, strict=True)
            ]
            drift = torch.stack(gaps).sum() / tokens
            loss = task + self.weight * drift
            loss.backward()
            terms.append(torch.stack([task, drift, loss]).detach())
        task, drift, total = terms_sum(terms)
        return GuidedTerms(task, drift, total, tokens, 0)

    @contextmanager
    def _at_start(self) -> Iterator[None]:
        """Put the starting weights in for the block."""
        current = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            for name, parameter in self.parameters.items():
                parameter.data = self.start[name]
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = current[name]

    def state(self) -> dict[str, Tensor]:
        """The starting weights."""
        return {name: tensor.clone() for name, tensor in self.start.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restore the start from which distance is measured."""
        self.start = {name: state[name].to(parameter.device) for name, parameter in self.parameters.items()}
