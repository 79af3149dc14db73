"""Signed heads of the audit log, kept outside of the database: they show that the log was deleted or rewritten.

    {uri}/head-{entries}.json     {"entries", "head", "at", "signature"}

The signature (Ed25519) is of the other three as canonical JSON. A process that may write to the database must not
be able to write here or read the key: then deleting the log and its head is detected without a remembered one.
"""

from __future__ import annotations

import base64
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from reft_ray.core.errors import UsageError
from reft_ray.jobs.audit import AuditLog, Verification
from reft_ray.jobs.content import ContentStore

PUBLISH_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class SignedHead:
    """The head of a log of `entries` entries at a time (seconds since the epoch)."""

    entries: int
    head: str
    at: float

    def message(self) -> bytes:
        """What is signed."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":")).encode()


class AuditHeads:
    """Publish and read heads. `key` is a PEM file with a private key, made where it is absent, or with a public one."""

    def __init__(self, uri: str, key: str | Path) -> None:
        self._content = ContentStore(uri)
        self._private, self._public = _keys(Path(key))

    def verify(self, log: AuditLog) -> Verification:
        """Verify the log, which must contain the newest published head; a forged one is a fault."""
        try:
            newest = self.newest()
        except UsageError as error:
            return replace(log.verify(), fault=str(error))
        return log.verify(None if newest is None else newest.head)

    def publish(self, verified: Verification, now: float) -> bool:
        """Publish the head of a sound log that has grown, an hour after the last one; whether it did."""
        newest = self.newest()
        if self._private is None or verified.fault is not None:
            return False
        if newest is not None and (verified.entries <= newest.entries or now < newest.at + PUBLISH_SECONDS):
            return False
        head = SignedHead(verified.entries, verified.head, now)
        document = asdict(head) | {"signature": base64.b64encode(self._private.sign(head.message())).decode()}
        self._content.write(f"head-{head.entries:012d}.json", [json.dumps(document).encode()])
        return True

    def newest(self) -> SignedHead | None:
        """The newest head; None before the first. Raises UsageError for one with a wrong signature."""
        names = [name for name in self._content.names() if name.startswith("head-")]
        if not names:
            return None
        name = max(names)
        try:
            document = json.loads(b"".join(self._content.read(name)))
            signature = base64.b64decode(document.pop("signature"))
            head = SignedHead(**document)
            self._public.verify(signature, head.message())
        except (InvalidSignature, ValueError, TypeError, KeyError):
            raise UsageError(f"{self._content.uri(name)}: not a head signed with this key") from None
        return head


def _keys(path: Path) -> tuple[Ed25519PrivateKey | None, Ed25519PublicKey]:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        made = Ed25519PrivateKey.generate()
        pem = made.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        try:
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(pem)
        except FileExistsError:
            pass  # another gateway made it first
    data = path.read_bytes()
    try:
        private = serialization.load_pem_private_key(data, None) if b"PRIVATE" in data else None
        public = serialization.load_pem_public_key(data) if private is None else private.public_key()
    except ValueError:
        raise UsageError(f"{path}: not a PEM key") from None
    if not isinstance(public, Ed25519PublicKey):
        raise UsageError(f"{path}: not an Ed25519 key")
    return (private if isinstance(private, Ed25519PrivateKey) else None), public
