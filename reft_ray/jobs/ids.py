"""Object ids: OpenAI's prefixes and 96 random bits."""

from __future__ import annotations

import hashlib
import secrets

JOB = "ftjob-"
EVENT = "ftevent-"
CHECKPOINT = "ftckpt_"
FILE = "file-"
UPLOAD = "upload_"
PART = "part_"
KEY = "key_"
PROJECT = "proj_"
ORGANIZATION = "org-"
PERMISSION = "cp_"
ENDPOINT = "whe_"
WEBHOOK_EVENT = "evt_"
AUDIT = "audit_log-"
REVIEW = "review_"
APPEAL = "appeal_"
TRAINING_SESSION = "ts-"
TRAINING_REQUEST = "treq-"
TRAINING_EVENT = "tevent-"


def new_id(prefix: str) -> str:
    """A new id, e.g. `ftjob-5f0c...` with 24 hex digits."""
    return prefix + secrets.token_hex(12)


def derived_id(prefix: str, *parts: str) -> str:
    """A deterministic id, so that an object that is written again after a crash is the same object."""
    return prefix + hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
