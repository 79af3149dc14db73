"""The steps of a migration. Each can be repeated: what is done is recorded in `migration.json` and not done again."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx

from reft_ray.api.client import ScreeningClient
from reft_ray.api.http_retry import error_message, send
from reft_ray.atomic import atomic_write
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.migrate.bodies import body_of, plan
from reft_ray.migrate.source import OpenAISource
from reft_ray.rows.reader import RowReader
from reft_ray.screening.sources import find_sources
from reft_ray.screening.validation import Validated, validate_source

RECORD = "migration.json"
SHOWN_LINES = 10
_FILES = ("training_file", "validation_file")

Say = Callable[[str], None]


class Migration:
    """A migration into a folder: `files/` has the downloads, `migration.json` what is known and done."""

    def __init__(self, folder: Path, say: Say = lambda line: None) -> None:
        self._folder = folder
        self._say = say
        self.record: dict[str, Any] = {"files": {}, "jobs": {}}
        path = folder / RECORD
        if path.is_file():
            try:
                self.record = json.loads(path.read_text())
            except ValueError:
                raise UsageError(f"{path} is damaged; remove it to start again") from None

    def read(self, source: OpenAISource) -> None:
        """List files and jobs, and download the files."""
        files = source.files()
        self._say(f"{len(files)} training files")
        for file in files:
            entry = self.record["files"].setdefault(file["id"], {})
            entry |= {"filename": file.get("filename"), "bytes": file.get("bytes")}
            path = self._path(file)
            entry["path"] = str(path.relative_to(self._folder))
            if not (path.is_file() and path.stat().st_size == file.get("bytes")):
                self._say(f"downloading {file['id']} ({file.get('filename')})")
                source.download(file["id"], path)
            self._save()
        jobs = source.jobs()
        self._say(f"{len(jobs)} jobs")
        for job in jobs:
            self.record["jobs"].setdefault(job["id"], {})["source"] = {
                "status": job.get("status"),
                "created_at": job.get("created_at"),
                "body": body_of(job),
            }
        self._save()

    def plan(self, models: Mapping[str, str]) -> None:
        """Validate every file, and plan every job."""
        for file_id, entry in self.record["files"].items():
            entry["validation"] = _validated(str(self._folder / entry["path"]))
            self._say(f"{file_id}: {entry['validation']['rows']} rows, {entry['validation']['invalid']} invalid")
        for job in self.record["jobs"].values():
            planned = plan(job["source"]["body"], models)
            body, deviations = planned.body, [found._asdict() for found in planned.deviations]
            for name in _FILES:
                file_id = job["source"]["body"].get(name)
                if file_id and file_id not in self.record["files"]:
                    body = None
                    deviations.append({"field": name, "message": f"{file_id} no longer exists at the source"})
            job["plan"] = {"body": body, "deviations": deviations}
        self._save()

    def screen(self, url: str, key: str | None) -> None:
        """Screen every file with a running service; files that were screened before are skipped."""
        with ScreeningClient(url, key) as client:
            for file_id, entry in self.record["files"].items():
                if "screening" in entry:
                    continue
                counts: Counter[str] = Counter()
                lines: list[int] = []
                with (self._folder / entry["path"]).open("rb") as rows:
                    for verdict in client.screen(rows):
                        counts[verdict["decision"]] += 1
                        if verdict["decision"] != "allow" and len(lines) < SHOWN_LINES:
                            lines.append(verdict["row"] + 1)
                entry["screening"] = {**counts, "first_lines": lines}
                self._say(f"{file_id}: {counts['block']} blocked, {counts['review']} for review")
                self._save()

    def run(self, url: str, key: str | None) -> None:
        """Upload the files that planned jobs need, and create the jobs, oldest first."""
        headers = {"authorization": f"Bearer {key}"} if key else {}
        base = f"{url.rstrip('/').removesuffix('/v1')}/v1"
        with httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(600.0, connect=10.0)) as client:
            jobs = sorted(self.record["jobs"].items(), key=lambda item: item[1]["source"]["created_at"] or 0)
            for job_id, job in jobs:
                body = job["plan"]["body"]
                if body is None or "created" in job:
                    continue
                files = {name: self._uploaded(client, body[name]) for name in _FILES if body.get(name)}
                try:
                    job["created"] = _created(client, "/fine_tuning/jobs", json=body | files)["id"]
                except ReftError as error:
                    job["error"] = str(error)
                    self._say(f"{job_id}: {error}")
                else:
                    job.pop("error", None)
                    self._say(f"{job_id} runs as {job['created']}")
                self._save()

    def _uploaded(self, client: httpx.Client, file_id: str) -> str:
        entry = self.record["files"][file_id]
        if "uploaded" not in entry:
            path = self._folder / entry["path"]
            # Read whole: a request that is repeated has to send it again.
            content = {"file": (entry["filename"] or path.name, path.read_bytes())}
            entry["uploaded"] = _created(client, "/files", data={"purpose": "fine-tune"}, files=content)["id"]
            self._save()
        return str(entry["uploaded"])

    def _path(self, file: Mapping[str, Any]) -> Path:
        """The name at the source may be any text: only its plain characters are used."""
        plain = re.sub(r"[^\w.-]+", "_", f"{file['id']}-{file.get('filename') or 'rows.jsonl'}")[-150:]
        return self._folder / "files" / f"{plain.lstrip('.').removesuffix('.jsonl')}.jsonl"

    def _save(self) -> None:
        with atomic_write(self._folder / RECORD) as scratch:
            scratch.write_text(json.dumps(self.record, indent=2, ensure_ascii=False))


def _validated(path: str) -> dict[str, Any]:
    total = Validated()
    lines: list[int] = []
    try:
        (source,) = find_sources([path], None)
        for line, _ in validate_source(source, RowReader(), total, 1):
            if len(lines) < SHOWN_LINES:
                lines.append(line)
    except UsageError as error:
        return {"rows": 0, "invalid": 0, "codes": {}, "first_lines": [], "error": str(error)}
    return {"rows": total.rows, "invalid": total.invalid, "codes": dict(total.codes), "first_lines": lines}


def _created(client: httpx.Client, path: str, **request: Any) -> dict[str, Any]:
    """The object that a POST has made. Raises ReftError with the service's message."""
    try:
        response = send(client, "POST", path, attempts=3, **request)
    except httpx.TransportError as error:
        raise ReftError(f"{client.base_url}: {type(error).__name__}") from None
    if response.is_error:
        raise ReftError(error_message(response, f"HTTP {response.status_code}"))
    found: dict[str, Any] = response.json()
    return found
