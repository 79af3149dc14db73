"""The dossier of a job: complete, without text of rows, and with a hash of everything in it."""

import hashlib
import json

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from reft_ray.cli.main import app
from reft_ray.core.errors import ReftError
from reft_ray.jobs.audit import AuditLog
from reft_ray.jobs.errors import NotFoundError
from reft_ray.jobs.evidence import write_dossier

SECRET = "where the treasure is"


@pytest.fixture
def finished(harness):
    job = harness.drive(harness.job(*[f"{SECRET} {index}" for index in range(12)]))
    log = AuditLog(harness.jobs.database)
    for job_id in (job.id, "ftjob-another"):
        log.append("fine_tuning.job.created", {"type": "session"}, "proj_a", {"id": job_id})
    return job


def test_a_dossier_has_job_events_files_and_audit_with_their_hashes(harness, finished, tmp_path):
    out = tmp_path / "dossier"
    index = write_dossier(harness.jobs, harness.files, finished.id, out)
    assert {"job.json", "files.json", "events.jsonl", "reviews.jsonl", "audit.jsonl"} <= index["files"].keys()
    assert json.loads((out / "index.json").read_text()) == index
    for name, digest in index["files"].items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    job = json.loads((out / "job.json").read_text())
    assert (job["id"], job["status"], job["spec"]["seed"]) == (finished.id, "succeeded", 1)
    assert job["steps"]["screen"]["rows"] == 12
    files = {one["id"]: one for one in json.loads((out / "files.json").read_text())}
    content = harness.files.read(finished.spec.training_file, finished.project_id)
    assert files[finished.spec.training_file]["sha256"] == hashlib.sha256(b"".join(content)).hexdigest()
    (entry,) = map(json.loads, (out / "audit.jsonl").read_text().splitlines())
    assert (entry["type"], entry["data"]) == ("fine_tuning.job.created", {"id": finished.id})
    assert (index["audit"]["entries"], index["audit"]["fault"]) == (2, None)
    everything = b"".join(path.read_bytes() for path in out.iterdir())
    assert SECRET.encode() not in everything
    assert str(tmp_path / "content").encode() not in everything


def test_other_jobs_stay_out(harness, finished, tmp_path):
    other = harness.job()
    write_dossier(harness.jobs, harness.files, finished.id, tmp_path / "dossier")
    assert other not in "".join(path.read_text() for path in (tmp_path / "dossier").iterdir())


def test_a_deleted_file_and_a_full_directory(harness, finished, tmp_path):
    harness.files.delete(finished.spec.training_file, finished.project_id)
    out = tmp_path / "dossier"
    write_dossier(harness.jobs, harness.files, finished.id, out)
    assert json.loads((out / "files.json").read_text())[0] == {"id": finished.spec.training_file, "deleted": True}
    with pytest.raises(ReftError, match="not empty"):
        write_dossier(harness.jobs, harness.files, finished.id, out)
    with pytest.raises(NotFoundError):
        write_dossier(harness.jobs, harness.files, "ftjob-none", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_the_command_writes_it_and_reports_a_broken_log(harness, finished, tmp_path):
    def run(name):
        options = ["--out", str(tmp_path / name), "--files", str(tmp_path / "content")]
        return CliRunner().invoke(
            app, ["evidence", finished.id, "--database", f"sqlite:///{tmp_path / 'jobs.db'}", *options]
        )

    result = run("a")
    assert (result.exit_code, "none changed" in result.output) == (0, True), result.output
    with harness.jobs.database.write() as connection:
        connection.execute(text("UPDATE audit_log SET type = 'x.y' WHERE seq = 1"))
    broken = run("b")
    assert (broken.exit_code, "broken" in broken.output) == (1, True)
