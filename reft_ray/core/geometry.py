"""The geometry in which a prompt is compared with the refusal feature.

    plain      s(x) = cos(f(x), R)                                                  (arXiv 2506.07356)
    centred    s(x) = cos(f(x) - c, R)              c the midpoint of the class means
    whitened   s(x) = cos(W (f(x) - c), W R)        W = S^(-1/2), S the covariance within the classes

On a language model the plain cosine is dominated by directions that all prompts share. Whitening removes them: in these
coordinates R is Fisher's discriminant, and the score stays a cosine in [-1, 1] with its zero between the classes.

Shape suffixes: B rows, D width, 2 the classes (0 harmless, 1 harmful).
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from reft_ray.core.forward import AllReduce


class Geometry(StrEnum):
    """How features are transformed before the cosine."""

    PLAIN = "plain"
    CENTRED = "centred"
    WHITENED = "whitened"


class ClassMoments:
    """Counts, sums and outer products of features per class, in float64.

    Moments add up: over batches, over data-parallel ranks (`reduce`), and over parts of a dataset.
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        # Rows are augmented by a one, so that one matrix per class holds outer products, sums and the count.
        self._moments_2EE = torch.zeros(2, width + 1, width + 1, dtype=torch.float64, device=device)

    def add(self, feature_BD: Tensor, label_B: Tensor) -> ClassMoments:
        """Add labelled rows; rows with a label other than 0 or 1 are ignored."""
        for label in (0, 1):
            rows_BD = feature_BD.detach()[label_B.to(feature_BD.device) == label].double()
            rows_BE = torch.cat([rows_BD, rows_BD.new_ones(len(rows_BD), 1)], dim=-1)
            self._moments_2EE[label] += rows_BE.T @ rows_BE
        return self

    def __add__(self, other: ClassMoments) -> ClassMoments:
        """The moments of both sets of rows."""
        return self._like(self._moments_2EE + other._moments_2EE)

    def __sub__(self, other: ClassMoments) -> ClassMoments:
        """The moments without a part of the rows."""
        return self._like(self._moments_2EE - other._moments_2EE)

    def _like(self, moments_2EE: Tensor) -> ClassMoments:
        other = copy(self)
        other._moments_2EE = moments_2EE
        return other

    def reduce(self, all_reduce: AllReduce) -> ClassMoments:
        """Sum over ranks, in place."""
        self._moments_2EE = all_reduce(self._moments_2EE)
        return self

    @property
    def counts(self) -> tuple[int, int]:
        """Rows seen: harmless, harmful."""
        return int(self._moments_2EE[0, -1, -1]), int(self._moments_2EE[1, -1, -1])

    def means(self) -> Tensor:
        """The class means, [2, D] in float64. Raises ValueError unless both classes were seen."""
        if 0 in self.counts:
            raise ValueError(f"a refusal feature needs rows of both classes, got (harmless, harmful) = {self.counts}")
        return self._moments_2EE[:, -1, :-1] / self._moments_2EE[:, -1, -1:]

    def covariance(self) -> Tensor:
        """S, the covariance within the classes, pooled over them, [D, D] in float64."""
        mean_2D = self.means()
        count_2 = self._moments_2EE[:, -1, -1]
        scatter_DD = self._moments_2EE[:, :-1, :-1].sum(0) - (mean_2D.T * count_2) @ mean_2D
        return scatter_DD / (count_2.sum() - 2).clamp(min=1)


def whitening(covariance_DD: Tensor, shrinkage: float) -> Tensor:
    """W = S^(-1/2), [D, D], of S shrunk towards its mean variance: (1 - shrinkage) S + shrinkage tr(S) / D I."""
    if not 0.0 < shrinkage <= 1.0:
        raise ValueError(f"shrinkage must be in (0, 1], got {shrinkage}")
    variance = covariance_DD.diagonal().mean()
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD)
    # Rounding leaves tiny negative variances, and features that never vary have none to shrink towards.
    shrunk_D = (1 - shrinkage) * values_D.clamp(min=0) + shrinkage * variance.clamp(min=1e-12)
    return (vectors_DD * shrunk_D.rsqrt()) @ vectors_DD.T


@dataclass(frozen=True, slots=True)
class Readout:
    """The refusal score of one layer's features. `offset_D` is W c and `refusal_D` is W R; absent parts are identities.

    One matrix product and one cosine: whitening costs nothing next to a layer of the model.
    """

    refusal_D: Tensor
    offset_D: Tensor | None = None
    whitening_DD: Tensor | None = None

    @classmethod
    def fit(cls, moments: ClassMoments, geometry: Geometry, shrinkage: float = 0.2, narrow: bool = False) -> Readout:
        """The readout of labelled reference features. Raises ValueError unless both classes were seen.

        With `narrow` its map has values of half precision, which halves the artefact.
        """
        harmless_D, harmful_D = moments.means()
        refusal_D, centre_D = harmful_D - harmless_D, (harmful_D + harmless_D) / 2
        if geometry is Geometry.PLAIN:
            return cls(refusal_D.float())
        if geometry is Geometry.CENTRED:
            return cls(refusal_D.float(), centre_D.float())
        map_DD = whitening(moments.covariance(), shrinkage)
        if narrow:
            # A cosine does not depend on the map's scale.
            map_DD = (map_DD / map_DD.abs().max()).half().double()
        return cls((map_DD @ refusal_D).float(), (map_DD @ centre_D).float(), map_DD.float())

    def score(self, feature_BD: Tensor) -> Tensor:
        """s(x), [B] in [-1, 1], in float32 whatever the model computes in."""
        x_BD = feature_BD.float()
        if self.whitening_DD is not None:
            x_BD = x_BD @ self.whitening_DD.T
        if self.offset_D is not None:
            x_BD = x_BD - self.offset_D
        return F.cosine_similarity(x_BD, self.refusal_D, dim=-1)

    def to(self, device: torch.device | str) -> Readout:
        """The same readout on another device."""
        return Readout(*(None if part is None else part.to(device) for part in self._parts))  # type: ignore[arg-type]

    @property
    def _parts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.refusal_D, self.offset_D, self.whitening_DD

    def tensors(self) -> dict[str, Tensor]:
        """The parts by name, for a file; a narrow map in half precision, so that nothing is lost."""
        named = zip(("refusal", "offset", "whitening"), self._parts, strict=True)
        found = {name: part for name, part in named if part is not None}
        map_DD = self.whitening_DD
        if map_DD is not None and torch.equal(map_DD.half().float(), map_DD):
            found["whitening"] = map_DD.half()
        return found

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Readout:
        """Read what `tensors` gave. Raises KeyError without a refusal feature."""
        map_DD = tensors.get("whitening")
        return cls(tensors["refusal"], tensors.get("offset"), None if map_DD is None else map_DD.float())


@dataclass(frozen=True, slots=True)
class Readouts:
    """The filter's score: the mean of the scores of one or more layers."""

    by_layer: Mapping[int, Readout]

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are read, in order."""
        return tuple(sorted(self.by_layer))

    def score(self, features: Mapping[int, Tensor]) -> Tensor:
        """s(x), [B], from the features [B, D] of each layer."""
        scores = [readout.score(features[layer]) for layer, readout in self.by_layer.items()]
        return scores[0] if len(scores) == 1 else torch.stack(scores).mean(0)

    def to(self, device: torch.device | str) -> Readouts:
        """The same readouts on another device."""
        return Readouts({layer: readout.to(device) for layer, readout in self.by_layer.items()})

    def tensors(self) -> dict[str, Tensor]:
        """`LAYER.NAME` -> tensor, for a file."""
        return {f"{n}.{name}": part for n, readout in self.by_layer.items() for name, part in readout.tensors().items()}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Readouts:
        """Read what `tensors` gave. Raises KeyError or ValueError for anything else."""
        parts: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            layer, name = key.split(".")
            parts.setdefault(int(layer), {})[name] = tensor
        return cls({layer: Readout.from_tensors(named) for layer, named in sorted(parts.items())})


def separation_hinge(score_B: Tensor, label_B: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """REG of the bounded kind, as two sums: relu(margin - s) over harmful rows, relu(margin + s) over harmless rows.

    A margin of 1 gives the paper's 1 - s and 1 + s. A smaller one stops pulling rows that are separated already,
    and sources outside the training set stay separated too: the unbounded form saturates.
    """
    hinge = torch.stack([margin - score_B, margin + score_B])
    # At a margin of 1 nothing is cut off but rounding errors.
    harmful, harmless = hinge if margin >= 1 else F.relu(hinge)
    return harmful[label_B == 1].sum(), harmless[label_B == 0].sum()
