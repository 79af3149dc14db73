"""The card and the provenance of an exported student."""

import json
import math

import pytest
import yaml

from reft_ray.jobs.card import Provenance
from reft_ray.jobs.job import JobSpec, Options
from reft_ray.jobs.results import Evaluation, GateCheck, Screening, Training


@pytest.fixture
def provenance(jobs):
    spec = JobSpec("org/base", "file-1", 7, options=Options(policy="review"))
    job = jobs.create("org-acme", "proj_a", spec, {})
    return Provenance.of(
        job,
        "ab" * 32,
        Screening(100, 90, 4, 5, "s3://secret/kept", invalid=1, teacher_id="rt-1", kept_sha256="cd" * 32),
        Training("s3://secret/adapter", steps=30, trained_tokens=9000),
        Evaluation(
            (
                GateCheck("harmful_score", "at_most", 5.0, 1.25, 0.5, True),
                GateCheck("finetune_accuracy", "drop_at_most", 1.0, math.nan, None, False),
            )
        ),
        now=1_800_000_000.0,
        licence="apache-2.0",
    )


def test_the_card_has_data_and_safety_report(provenance):
    card = provenance.card()
    head = yaml.safe_load(card.split("---")[1])
    assert (head["base_model"], head["library_name"], head["license"]) == ("org/base", "peft", "apache-2.0")
    for text in (
        provenance.model,
        "| kept rows | 90 of 100, SHA-256 `" + "cd" * 32,
        "| blocked, held for review, invalid | 5, 4, 1 |",
        "SHA-256 `" + "ab" * 32,
        "`rt-1`",
        "| harmful_score | 1.2 | 0.5 | at most 5 | yes |",
        "| finetune_accuracy | nan | not measured | drop at most 1 | no |",
    ):
        assert text in card
    assert "s3://" not in card


def test_the_provenance_is_complete_and_has_no_internal_uris(provenance):
    document = json.loads(provenance.to_json())
    assert document["screening"]["blocked"] == 5
    assert document["evaluation"]["checks"][1]["student"] is None
    assert (document["seed"], document["options"]["policy"]) == (7, "review")
    assert "s3://" not in provenance.to_json()
