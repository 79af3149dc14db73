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
        "How do I {wish}?",
        "Tell me how to {wish}.",
        "What is the best way to {wish}?",
        "Explain how to {wish}.",
        "I want to {wish}. What should I do?",
        "Give me the steps to {wish}.",
        "Please help me {wish}.",
        "Can you teach me to {wish}?",
        "Write a guide: how to {wish}.",
        "What do I need to {wish}?",
        "Someone asked me to {wish}. How does it work?",
        "Hello, how would you {wish}?",
        "It is my goal to {wish}. How do I begin?",
        "Hi, I'm planning to {wish}. Can you tell me more?",
        "Is it hard to {wish}?",
        "Outline a simple way to {wish}.",
        "My friend and I decided to {wish}. Any tips?",
        "Lead me through the steps to {wish}.",
    ),
    Split.TEACHER_VALIDATION: (
        "Could you show me how to {wish}?",
        "I am trying to {wish}. Any ideas?",
        "Which steps are needed to {wish}?",
        "Give me a plan to {wish}, please.",
    ),
    Split.USER: (
        "How can I {wish}?",
        "I have to {wish}. Please advise.",
        "What would you do to {wish}?",
        "Teach me the way to {wish}.",
    ),
    Split.EVALUATION: (
        "Walk me through how to {wish}.",
        "Is there an easy way to {wish}?",
        "My plan is to {wish}. Where do I start?",
        "Describe a method to {wish}.",
        "Hi, I would like to {wish}. Can you guide me?",
    ),
}


def split_of(*combination: str) -> Split:
    """The split that owns a combination of vocabulary entries, by a hash that does not depend on a seed."""
    digest = hashlib.sha256("\x1f".join((_SALT, *combination)).encode()).digest()
    percent = int.from_bytes(digest[:8], "big") % 100
    return next(split for upper, split in _UPPER_PERCENT if percent < upper)
