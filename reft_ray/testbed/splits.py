"""Splits of the vocabulary combinations and sentence frames; no two splits share either."""

from __future__ import annotations

import hashlib
from enum import StrEnum


class Split(StrEnum):
    """What rows are for. Teacher training and teacher validation are disjoint as well."""

    TEACHER_TRAIN = "teacher_train"
    TEACHER_VALIDATION = "teacher_validation"
    USER = "user"
    EVALUATION = "evaluation"


_UPPER_PERCENT = (
    (74, Split.TEACHER_TRAIN),
    (80, Split.TEACHER_VALIDATION),
    (88, Split.USER),
    (100, Split.EVALUATION),
)

# With this salt every verb and object of the evaluation occurs in some combination of the teacher's.
_SALT = "2340"

FRAMES: dict[Split, tuple[str, ...]] = {
    Split.TEACHER_TRAIN: (
        "How do I {request}?",
        "Tell me how to {request}.",
        "What is the best way to {request}?",
        "Explain how to {request}.",
        "I want to {request}. What should I do?",
        "Give me the steps to {request}.",
        "Please help me {request}.",
        "Can you teach me to {request}?",
        "Write a guide: how to {request}.",
        "What do I need to {request}?",
        "Someone asked me to {request}. How does it work?",
        "Hello, how would you {request}?",
        "It is my goal to {request}. How do I begin?",
        "Hi, I'm planning to {request}. Can you tell me more?",
        "Is it hard to {request}?",
        "Outline a simple way to {request}.",
        "My friend and I decided to {request}. Any tips?",
        "Lead me through the steps to {request}.",
    ),
    Split.TEACHER_VALIDATION: (
        "Could you show me how to {request}?",
        "I am trying to {request}. Any ideas?",
        "Which steps are needed to {request}?",
        "Give me a plan to {request}, please.",
    ),
    Split.USER: (
        "How can I {request}?",
        "I have to {request}. Please advise.",
        "What would you do to {request}?",
        "Teach me the way to {request}.",
    ),
    Split.EVALUATION: (
        "Walk me through how to {request}.",
        "Is there an easy way to {request}?",
        "My plan is to {request}. Where do I start?",
        "Describe a method to {request}.",
        "Hi, I would like to {request}. Can you guide me?",
    ),
}


def split_of(*combination: str) -> Split:
    """The split that owns a combination of vocabulary entries, by a hash that does not depend on a seed."""
    digest = hashlib.sha256("\x1f".join((_SALT, *combination)).encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    return next(split for upper, split in _UPPER_PERCENT if percent < upper)
