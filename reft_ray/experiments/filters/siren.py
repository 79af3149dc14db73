"""SIREN: a small network on the neurons of all layers that sparse probes select; the base model stays frozen.

    f_l(x)  = mean of the residual stream after layer l over the text's tokens, without a chat template        [D]
    probe_l = logistic regression on f_l with an L1 penalty; its neurons are the largest |weights| that make up
              SALIENT of their sum
    z(x)    = the selected neurons of all layers, each layer's times max(0.1, its probe's score between those of the
              worst (0) and the best (1) layer)
    score   = 2 p(harmful | z) - 1, from a multilayer perceptron

Source: Jiao et al., "LLM Safety From Within: Detecting Harmful Content with Internal Representations", arXiv
2604.18519; github.com/CSSLab/SIREN. There a search chooses the network's sizes and dropout by cross-validation; here
two sizes and penalties are compared on the validation prompts, as are the probes' penalties.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from reft_ray.core.batch import TokenizedExample, collate, token_batches
from reft_ray.core.conversation import Example
from reft_ray.core.quality import auroc
from reft_ray.experiments.filters.linear import filters_extra
from reft_ray.experiments.filters.rows import labels_of, texts_of
from reft_ray.experiments.filters.scores import Score
from reft_ray.hf.chat import ChatFormat
from reft_ray.hf.compute import resolve_dtype
from reft_ray.hf.loading import Base, load_base

ABOUT = "SIREN: neurons of all layers that sparse probes select, and a small network on them"

STRENGTHS = (0.01, 0.1, 1.0)
"""Inverse L1 penalties of the probes."""
SALIENT = 0.8
SIZES, PENALTIES = ((256, 64), (512, 128)), (1e-4, 1e-1)
_BATCH_TOKENS = 2048
_LEAST_WEIGHT = 0.1

Matrix = npt.NDArray[np.float32]


def fit_siren(base_name: str, device: str, train: Sequence[Example], validation: Sequence[Example]) -> Score:
    """Fit the probes and the network. Raises ReftError if the extra is not installed."""
    with filters_extra():
        from sklearn.linear_model import LogisticRegression
        from sklearn.neural_network import MLPClassifier

    base = load_base(base_name, resolve_dtype("auto", device), device)
    known_LBD, held_LBD = (pooled(base, texts_of(rows)) for rows in (train, validation))
    target_B, held_label_B = labels_of(train).numpy(), labels_of(validation)

    def quality(model: Any, matrix: Matrix) -> float:
        return auroc(torch.from_numpy(model.predict_proba(matrix)[:, 1]), held_label_B)

    neurons: list[npt.NDArray[np.intp]] = []
    scores: list[float] = []
    for known_BD, held_BD in zip(known_LBD, held_LBD, strict=True):
        probes = [
            LogisticRegression(C=strength, l1_ratio=1.0, solver="liblinear", random_state=0).fit(known_BD, target_B)
            for strength in STRENGTHS
        ]
        rated = [quality(probe, held_BD) for probe in probes]
        best = int(np.argmax(rated))
        neurons.append(salient(np.abs(probes[best].coef_[0])))
        scores.append(rated[best])
    low, spread = min(scores), (max(scores) - min(scores)) or 1.0
    weights = [max(_LEAST_WEIGHT, (score - low) / spread) for score in scores]

    def selected(states_LBD: Matrix) -> Matrix:
        parts = zip(states_LBD, neurons, weights, strict=True)
        return np.concatenate([states_BD[:, chosen] * weight for states_BD, chosen, weight in parts], axis=1)

    known, held = selected(known_LBD), selected(held_LBD)
    networks = [
        MLPClassifier(sizes, alpha=penalty, early_stopping=True, random_state=0).fit(known, target_B)
        for sizes, penalty in product(SIZES, PENALTIES)
    ]
    network = max(networks, key=lambda one: quality(one, held))

    def score(texts: Sequence[str]) -> Tensor:
        return 2.0 * torch.from_numpy(network.predict_proba(selected(pooled(base, texts)))[:, 1]).double() - 1.0

    return score


def salient(weight_D: npt.NDArray[Any]) -> npt.NDArray[np.intp]:
    """The places of the largest weights that make up SALIENT of their sum, at least one."""
    order = np.argsort(-weight_D)
    share = np.cumsum(weight_D[order]) / max(float(weight_D.sum()), np.finfo(float).tiny)
    return order[: int(np.searchsorted(share, SALIENT)) + 1]


@torch.inference_mode()
def pooled(base: Base, texts: Sequence[str]) -> Matrix:
    """f_l of every layer, [L, B, D]; texts are truncated to the context."""
    found = torch.empty(base.layers, len(texts), base.width)
    pad_id = ChatFormat(base.tokenizer).pad_id
    ids = [base.tokenizer(text, truncation=True, max_length=base.context)["input_ids"] or [pad_id] for text in texts]
    rows = [TokenizedExample(of_text, [False] * len(of_text), len(of_text) - 1) for of_text in ids]
    for places in token_batches([len(row) for row in rows], _BATCH_TOKENS):
        batch = collate([rows[place] for place in places], pad_id, base.model.device)
        mask_BT = batch.attention_mask_BT
        states = base.model.base_model(
            input_ids=batch.ids_BT, attention_mask=mask_BT, output_hidden_states=True, use_cache=False
        ).hidden_states[1:]
        share_BT = mask_BT / mask_BT.sum(1, keepdim=True)
        for layer, state_BTD in enumerate(states):
            found[layer, places] = torch.einsum("btd,bt->bd", state_BTD.float(), share_BT).cpu()
    return found.numpy()
