"""The bill of materials of a student: valid CycloneDX, with the hashes of what it names."""

import hashlib
import json

import pytest

from reft_ray.jobs.bom import student_bom
from reft_ray.jobs.card import Provenance
from reft_ray.jobs.results import Evaluation, GateCheck, Screening, Training


@pytest.fixture
def bom(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    (tmp_path / "adapter_config.json").write_text("{}")
    provenance = Provenance(
        model="ft:tiny:acme::Ab", base_model="tiny", job_id="ftjob-1", created_at=1_700_000_000.0, seed=7,
        training_file="file-1", training_sha256="a" * 64, licence="apache-2.0", base_fingerprint="abc",
        screening=Screening(rows=10, kept=8, review=1, blocked=1, invalid=0, kept_uri="/x", kept_sha256="b" * 64,
                            teacher_id="rt-1"),
        training=Training("/adapter", 4, 100),
        evaluation=Evaluation((GateCheck("harmful_score", "at_most", 5.0, 1.0, 0.5, True),)),
    )  # fmt: skip
    files = ["adapter_model.safetensors", "adapter_config.json", "missing"]
    return student_bom(provenance, tmp_path, files)


def test_it_is_valid_cyclonedx(bom):
    validation = pytest.importorskip("cyclonedx.validation.json", reason="cyclonedx-python-lib is not installed")
    from cyclonedx.schema import SchemaVersion

    assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(bom) is None


def test_it_names_base_teacher_and_data_with_their_hashes(bom):
    found = json.loads(bom)
    student = found["metadata"]["component"]
    assert (student["type"], student["name"]) == ("machine-learning-model", "ft:tiny:acme::Ab")
    assert [(part["name"], part["hashes"][0]["content"]) for part in student["components"]] == [
        ("adapter_config.json", hashlib.sha256(b"{}").hexdigest()),
        ("adapter_model.safetensors", hashlib.sha256(b"weights").hexdigest()),
    ]
    assert [part["name"] for part in found["components"]] == ["tiny", "rt-1", "file-1", "file-1 (kept rows)"]
    assert found["components"][2]["hashes"] == [{"alg": "SHA-256", "content": "a" * 64}]
    assert found["dependencies"][0]["dependsOn"] == [part["bom-ref"] for part in found["components"]]
    assert len({part["bom-ref"] for part in found["components"]}) == 4
