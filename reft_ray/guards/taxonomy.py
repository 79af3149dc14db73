"""The categories of guards as OpenAI's categories and MLCommons' hazards."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from reft_ray.core.cascade import Opinion
from reft_ray.core.hazards import HAZARDS, OPENAI_CATEGORIES, categories_of, hazards_of

LLAMA_GUARD: Mapping[str, tuple[str, ...]] = {
    **{f"s{number}": (code,) for number, code in enumerate(HAZARDS, start=1)},
    # The numbers follow MLCommons' list up to S12.
    "s13": ("elections",),
    "s14": ("code interpreter abuse",),
}

QWEN3GUARD: Mapping[str, tuple[str, ...]] = {
    "violent": ("vcr",),
    "non-violent illegal acts": ("nvc",),
    "sexual content or sexual acts": ("sxc",),
    "sexual content": ("sxc",),
    "pii": ("prv",),
    "personally identifiable information": ("prv",),
    "suicide & self-harm": ("ssh",),
    "copyright violation": ("ipv",),
}

NEMOTRON: Mapping[str, tuple[str, ...]] = {
    "violence": ("vcr",),
    "sexual": ("sxc",),
    "criminal planning/confessions": ("nvc",),
    "guns and illegal weapons": ("icw",),
    "controlled/regulated substances": ("nvc",),
    "suicide and self harm": ("ssh",),
    "sexual (minor)": ("cse",),
    "sexual minor": ("cse",),
    "hate/identity hate": ("hte",),
    "pii/privacy": ("prv",),
    "threat": ("vcr",),
    "fraud/deception": ("nvc",),
    "malware": ("nvc",),
    "copyright/trademark/plagiarism": ("ipv",),
    "unauthorized advice": ("spc",),
    "illegal activity": ("nvc",),
}

SHIELDGEMMA: Mapping[str, tuple[str, ...]] = {
    "dangerous content": ("vcr", "ssh"),
    "hate speech": ("hte",),
    "sexually explicit information": ("sxc",),
}


def opinion(probability: float, labels: Iterable[str], table: Mapping[str, tuple[str, ...]], part: str) -> Opinion:
    """An Opinion from a guard's own labels; one that is in no list stays as it is."""
    categories: dict[str, None] = {}
    hazards: dict[str, None] = {}
    for label in (name.strip().lower() for name in labels):
        if label in OPENAI_CATEGORIES:
            categories[label] = None
            hazards |= dict.fromkeys(hazards_of([label]))
            continue
        codes = table.get(label, (label,) if label in HAZARDS else ())
        known = [code for code in codes if code in HAZARDS]
        hazards |= dict.fromkeys(known)
        # What OpenAI has no category for keeps its name.
        names = categories_of(known) or ([HAZARDS[known[0]]] if known else codes[:1] or [label])
        categories |= dict.fromkeys(names)
    return Opinion(probability, tuple(categories), tuple(hazards), part)
