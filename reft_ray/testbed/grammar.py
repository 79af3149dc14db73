"""Requests of the synthetic dataset: verb x object x purpose, labelled by composition, and their wording."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

from reft_ray.core.conversation import Label
from reft_ray.testbed import lexicon
from reft_ray.testbed.splits import FRAMES, Split, split_of


class Kind(StrEnum):
    """How a request is composed."""

    HARMFUL = "harmful"
    """A harmful verb with a target."""
    ILL_PURPOSE = "ill_purpose"
    """Ordinary words that are harmful by their purpose."""
    LOOKALIKE = "lookalike"
    """A harmful verb with a harmless object."""
    SAFE_VERB = "safe_verb"
    """An ordinary verb with a target."""
    CONSENT = "consent"
    """Ordinary words, with the owner's consent."""
    EVERYDAY = "everyday"
    """An ordinary verb and object."""


HARMFUL_KINDS = (Kind.HARMFUL, Kind.ILL_PURPOSE)
CONTRAST_KINDS = (Kind.LOOKALIKE, Kind.SAFE_VERB, Kind.CONSENT)


@dataclass(frozen=True, slots=True)
class Request:
    """A request's meaning; (verb, object) determines its split."""

    kind: Kind
    domain: str
    verb: str
    object: str
    steps: tuple[str, ...]

    @property
    def label(self) -> Label:
        """Harmful or harmless, by composition."""
        return Label.HARMFUL if self.kind in HARMFUL_KINDS else Label.HARMLESS

    @property
    def action(self) -> str:
        """Verb and object, e.g. `rob a bank`."""
        return f"{self.verb} {self.object}"

    @property
    def split(self) -> Split:
        """The split that owns the combination."""
        return split_of(self.verb, self.object)


_ORDINARY_STEPS = lexicon.words(
    "take your time | look closely | ask a friend | start with a small part | write down what you see"
)
_INTRUSION_STEPS: tuple[str, ...] = (
    "wait for a quiet moment",
    "look for the key",
    "take a picture of it",
    "put it back as it was",
)


@cache
def requests(kind: Kind, split: Split) -> tuple[Request, ...]:
    """Every request of this kind whose combination the split owns, in a fixed order."""
    return tuple(request for request in _all_requests(kind) if request.split is split)


def _all_requests(kind: Kind) -> Iterable[Request]:
    if kind is Kind.EVERYDAY:
        for topic in lexicon.TOPICS:
            yield from _product(kind, topic.name, topic.verbs, topic.objects, topic.steps)
    elif kind in (Kind.ILL_PURPOSE, Kind.CONSENT):
        steps = _INTRUSION_STEPS if kind is Kind.ILL_PURPOSE else _ORDINARY_STEPS
        yield from _product(kind, "intrusion", lexicon.INTRUSION_VERBS, lexicon.INTRUSION_OBJECTS, steps)
    else:
        for domain in lexicon.HARM_DOMAINS:
            verbs = domain.safe_verbs if kind is Kind.SAFE_VERB else domain.verbs
            objects = domain.lookalikes if kind is Kind.LOOKALIKE else domain.targets
            means = domain.steps if kind is Kind.HARMFUL else _ORDINARY_STEPS
            yield from _product(kind, domain.name, verbs, objects, means)


def _product(
    kind: Kind, domain: str, verbs: Sequence[str], objects: Sequence[str], steps: tuple[str, ...]
) -> Iterable[Request]:
    return (Request(kind, domain, verb, object_, steps) for verb in verbs for object_ in objects)


def prompt(request: Request, rng: random.Random, frames: Sequence[str] | None = None) -> str:
    """The request as a sentence: a frame of its split (or one of `frames`) around action and purpose."""
    frame = rng.choice(frames or FRAMES[request.split])
    return frame.format(request=" ".join(filter(None, (request.action, _purpose(request.kind, rng)))))


def _purpose(kind: Kind, rng: random.Random) -> str:
    if kind is Kind.ILL_PURPOSE:
        return rng.choice(lexicon.ILL_PURPOSES)
    if kind is Kind.CONSENT:
        return rng.choice(lexicon.CONSENTING_PURPOSES)
    if rng.random() < 0.5:
        return ""
    if kind is Kind.HARMFUL and rng.random() < 0.4:
        return rng.choice(lexicon.MALICE)
    return rng.choice(lexicon.CIRCUMSTANCES)
