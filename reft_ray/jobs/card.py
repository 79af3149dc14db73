"""The model card and the provenance record of an exported student."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from reft_ray.jobs.job import Job
from reft_ray.jobs.results import Evaluation, Screening, Training, finite

CARD_NAME = "README.md"
PROVENANCE_NAME = "reft_provenance.json"


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of a student. `training_sha256` is the hash of the uploaded file."""

    model: str
    base_model: str
    job_id: str
    created_at: float
    training_file: str
    training_sha256: str
    screening: Screening
    training: Training
    evaluation: Evaluation
    options: Mapping[str, Any] = field(default_factory=dict)
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    base_fingerprint: str | None = None
    licence: str | None = None

    @classmethod
    def of(
        cls,
        job: Job,
        training_sha256: str,
        screening: Screening,
        training: Training,
        evaluation: Evaluation,
        now: float,
        base_fingerprint: str | None = None,
        licence: str | None = None,
    ) -> Provenance:
        """The provenance of a job's student."""
        return cls(
            model=job.model_name,
            base_model=job.spec.model,
            job_id=job.id,
            created_at=now,
            training_file=job.spec.training_file,
            training_sha256=training_sha256,
            screening=screening,
            training=training,
            evaluation=evaluation,
            options=asdict(job.spec.options),
            hyperparameters=asdict(job.spec.hyperparameters),
            seed=job.spec.seed,
            base_fingerprint=base_fingerprint,
            licence=licence,
        )

    def to_json(self) -> str:
        """The text of `reft_provenance.json`, without URIs inside the service."""
        document = finite(asdict(self))
        del document["screening"]["kept_uri"], document["training"]["adapter_uri"]
        return json.dumps(document, indent=2, sort_keys=True) + "\n"

    def card(self) -> str:
        """The text of `README.md`, with the metadata header that model hubs read."""
        screening = self.screening
        lines = [
            "---",
            f"base_model: {json.dumps(self.base_model)}",
            "library_name: peft",
            "pipeline_tag: text-generation",
            *([f"license: {json.dumps(self.licence)}"] if self.licence else []),
            "tags: [lora, reft-ray, guided-finetuning]",
            "---",
            "",
            f"# {self.model}",
            "",
            f"An adapter on `{self.base_model}`, finetuned by job `{self.job_id}` with a Ref-Teacher that filtered the",
            "rows and distilled its refusals (arXiv 2506.07356). Load it with `peft`:",
            "",
            "```python",
            "from peft import AutoPeftModelForCausalLM",
            "",
            'model = AutoPeftModelForCausalLM.from_pretrained("PATH OF THIS DIRECTORY")',
            "```",
            "",
            "## Data",
            "",
            "| | |",
            "|---|---|",
            f"| uploaded file | `{self.training_file}`, SHA-256 `{self.training_sha256}` |",
            f"| kept rows | {screening.kept} of {screening.rows}, SHA-256 `{screening.kept_sha256 or 'not taken'}` |",
            f"| blocked, held for review, invalid | {screening.blocked}, {screening.review}, {screening.invalid} |",
            f"| teacher | `{screening.teacher_id or 'unknown'}` |",
            f"| policy | {self.options.get('policy', 'filter')} |",
            f"| steps, tokens | {self.training.steps}, {self.training.trained_tokens} |",
            "",
            "## Safety report",
            "",
            "Percentages; base is the model before finetuning.",
            "",
            "| measure | student | base | limit | held |",
            "|---|---|---|---|---|",
            *(
                f"| {check.measure} | {_number(check.student)} | {_number(check.base)} "
                f"| {check.bound.replace('_', ' ')} {check.limit:g} | {'yes' if check.holds else 'no'} |"
                for check in self.evaluation.checks
            ),
            "",
            "These figures are measured on the suites of this service and do not cover other prompts or languages.",
            "",
        ]
        return "\n".join(lines)


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f}"
