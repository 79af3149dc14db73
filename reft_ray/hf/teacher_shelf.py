"""The teachers of one base side by side, and which of them judges.

    SHELF/rt-.../          teachers by id, never changed
    SHELF/current          a link to the one that judges: `teacher:` of a service
    SHELF/changes.jsonl    who moved the link, from what to what and why: signed, and chained to the entry before

New thresholds are a new teacher (`reft-ray teacher thresholds --out`), so changing them is such a move, and undoing
them is the move back.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock

from reft_ray.atomic import atomic_directory
from reft_ray.core.errors import ReftError, UsageError
from reft_ray.hf.ref_teacher import RefTeacher

CURRENT, CHANGES = "current", "changes.jsonl"
_ALGORITHM = ec.ECDSA(hashes.SHA256())


@dataclass(frozen=True, slots=True)
class Change:
    """One move of the link. `at` is in seconds since the epoch, `previous` the SHA-256 of the entry before."""

    number: int
    at: float
    kind: Literal["install", "rollback"]
    by: str
    reason: str
    teacher: str
    before: str | None
    thresholds: dict[str, float]
    previous: str

    def message(self) -> bytes:
        """What is signed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()


class TeacherShelf:
    """A shelf. `key` is a PEM file of `reft-ray models keygen`: the private one moves the link, the public reads."""

    def __init__(self, folder: Path, key: Path) -> None:
        self.folder = folder
        self._private, self._public = _keys(key)

    def changes(self) -> list[Change]:
        """All changes, oldest first. Raises ReftError for one that is not signed with this key, or not in its place."""
        return [change for change, _ in self._read()]

    def installed(self) -> list[str]:
        """The teachers to go back through; the last one judges."""
        return _stack(self.changes())

    def check(self) -> None:
        """Raise ReftError unless the link shows the teacher of the last change."""
        wanted = self.installed()[-1:]
        link = self.folder / CURRENT
        found = [link.resolve().name] if link.is_symlink() else []
        if found != wanted:
            named = wanted[0] if wanted else "none"
            raise ReftError(f"{link} shows {found[0] if found else 'nothing'}, but the last change is to {named}")

    def install(self, teacher: Path, by: str, reason: str) -> Change:
        """Copy a teacher here and let it judge. Raises UsageError where it does already."""
        made = RefTeacher.load(teacher)
        with self._locked() as entries:
            stack = _stack([change for change, _ in entries])
            if stack[-1:] == [made.id]:
                raise UsageError(f"{made.id} is the current teacher already")
            target = self.folder / made.id
            if not target.is_dir():
                with atomic_directory(target) as copy:
                    shutil.copytree(made.folder, copy, dirs_exist_ok=True)
            return self._move(entries, "install", made.id, stack[-1] if stack else None, by, reason)

    def rollback(self, by: str, reason: str) -> Change:
        """Let the teacher judge that did before. Raises UsageError where there is none."""
        with self._locked() as entries:
            stack = _stack([change for change, _ in entries])
            if len(stack) < 2:
                raise UsageError(f"{self.folder} has no teacher to go back to")
            return self._move(entries, "rollback", stack[-2], stack[-1], by, reason)

    def _move(
        self,
        entries: Sequence[tuple[Change, bytes]],
        kind: Literal["install", "rollback"],
        teacher: str,
        before: str | None,
        by: str,
        reason: str,
    ) -> Change:
        if self._private is None:
            raise UsageError("the public key only reads changes: name the private one")
        if not (by.strip() and reason.strip()):
            raise UsageError("a change needs a name and a reason")
        made = RefTeacher.load(self.folder / teacher)
        thresholds = {name: float(value) for name, value in asdict(made.manifest.thresholds).items()}
        previous = hashlib.sha256(entries[-1][1]).hexdigest() if entries else ""
        change = Change(len(entries) + 1, time.time(), kind, by, reason, made.id, before, thresholds, previous)
        signature = base64.b64encode(self._private.sign(change.message(), _ALGORITHM)).decode()
        line = json.dumps(asdict(change) | {"signature": signature}).encode() + b"\n"
        with (self.folder / CHANGES).open("ab") as log:
            log.write(line)
            log.flush()
            os.fsync(log.fileno())
        scratch = self.folder / f".{CURRENT}.{os.getpid()}"
        scratch.unlink(missing_ok=True)
        scratch.symlink_to(teacher, target_is_directory=True)
        scratch.replace(self.folder / CURRENT)
        return change

    def _read(self) -> list[tuple[Change, bytes]]:
        path = self.folder / CHANGES
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        found: list[tuple[Change, bytes]] = []
        for number, line in enumerate(lines, 1):
            try:
                values: dict[str, Any] = json.loads(line)
                signature = base64.b64decode(values.pop("signature"))
                change = Change(**values)
                self._public.verify(signature, change.message(), _ALGORITHM)
            except (InvalidSignature, ValueError, TypeError, KeyError):
                raise ReftError(f"{path}: entry {number} is not signed with this key") from None
            previous = hashlib.sha256(found[-1][1]).hexdigest() if found else ""
            if (change.number, change.previous) != (number, previous):
                raise ReftError(f"{path}: entry {number} does not follow the one before")
            found.append((change, line))
        return found

    @contextmanager
    def _locked(self) -> Iterator[list[tuple[Change, bytes]]]:
        """The entries, while no other process changes them."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self.folder / ".lock"):
            yield self._read()


def _stack(changes: Sequence[Change]) -> list[str]:
    stack: list[str] = []
    for change in changes:
        if change.kind == "rollback":
            stack.pop()
        else:
            stack.append(change.teacher)
    return stack


def _keys(path: Path) -> tuple[ec.EllipticCurvePrivateKey | None, ec.EllipticCurvePublicKey]:
    try:
        data = path.read_bytes()
        private = serialization.load_pem_private_key(data, None) if b"PRIVATE" in data else None
        public = serialization.load_pem_public_key(data) if private is None else private.public_key()
    except (OSError, ValueError):
        raise UsageError(f"{path} is not a PEM key; make one with `reft-ray models keygen`") from None
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise UsageError(f"{path} is not an elliptic key; make one with `reft-ray models keygen`")
    return (private if isinstance(private, ec.EllipticCurvePrivateKey) else None), public
