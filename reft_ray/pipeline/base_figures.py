"""The base model's figures on the gate prompts, kept between jobs: they do not depend on the job."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from reft_ray.atomic import atomic_write
from reft_ray.evaluation.intervals import Measure
from reft_ray.evaluation.suite import Evaluation
from reft_ray.pipeline.measure import MeasureRequest


class BaseFigures:
    """Figures in JSON files below `folder`, one for each model, prompts, judges and length of answers."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def of(self, fingerprint: str, request: MeasureRequest, measure: Callable[[], Evaluation]) -> Evaluation:
        """The figures of the model with this fingerprint; measured where none are kept. A damaged file is replaced."""
        path = self._folder / f"{_key(fingerprint, request)}.json"
        try:
            kept = json.loads(path.read_text())
            return Evaluation({name: Measure(**values) for name, values in kept["measures"].items()}, kept["seed"])
        except (OSError, ValueError, KeyError, TypeError):
            found = measure()
        measures = {name: asdict(value) for name, value in found.measures.items()}
        with atomic_write(path) as scratch:
            scratch.write_text(json.dumps({"measures": measures, "seed": found.seed}))
        return found


def _key(fingerprint: str, request: MeasureRequest) -> str:
    suite = request.suite
    prompts = [
        [[[turn.role, turn.content, turn.extra] for turn in prompt] for prompt in group]
        for group in (suite.harmful, suite.harmless)
    ]
    judges = [judge.model_dump(mode="json") for judge in request.judges]
    values = [fingerprint, prompts, list(suite.categories), suite.seed, judges, request.max_new_tokens]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:32]
