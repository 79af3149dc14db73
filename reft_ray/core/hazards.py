"""Names of harm: the categories of OpenAI's moderation API and the hazards of MLCommons' AILuminate.

Neither covers the other. `categories_of` and `hazards_of` translate what has a counterpart and leave out the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

OPENAI_CATEGORIES = (
    "harassment",
    "harassment/threatening",
    "hate",
    "hate/threatening",
    "illicit",
    "illicit/violent",
    "self-harm",
    "self-harm/intent",
    "self-harm/instructions",
    "sexual",
    "sexual/minors",
    "violence",
    "violence/graphic",
)

HAZARDS: Mapping[str, str] = {
    "vcr": "violent crimes",
    "nvc": "non-violent crimes",
    "src": "sex-related crimes",
    "cse": "child sexual exploitation",
    "dfm": "defamation",
    "spc": "specialized advice",
    "prv": "privacy",
    "ipv": "intellectual property",
    "icw": "indiscriminate weapons",
    "hte": "hate",
    "ssh": "suicide and self-harm",
    "sxc": "sexual content",
}
"""MLCommons' codes and their meaning."""

_CATEGORIES: Mapping[str, tuple[str, ...]] = {
    "vcr": ("illicit/violent", "violence"),
    "nvc": ("illicit",),
    "src": ("illicit", "sexual"),
    "cse": ("sexual", "sexual/minors"),
    "dfm": ("harassment",),
    "icw": ("illicit/violent",),
    "hte": ("hate",),
    "ssh": ("self-harm",),
    "sxc": ("sexual",),
}
_HAZARDS: Mapping[str, tuple[str, ...]] = {
    "harassment/threatening": ("vcr",),
    "hate": ("hte",),
    "hate/threatening": ("hte", "vcr"),
    "illicit": ("nvc",),
    "illicit/violent": ("vcr", "icw"),
    "self-harm": ("ssh",),
    "self-harm/intent": ("ssh",),
    "self-harm/instructions": ("ssh",),
    "sexual": ("sxc",),
    "sexual/minors": ("cse",),
    "violence": ("vcr",),
    "violence/graphic": ("vcr",),
}


def categories_of(hazards: Iterable[str]) -> tuple[str, ...]:
    """OpenAI's categories for these hazards, each once."""
    return tuple(dict.fromkeys(name for hazard in hazards for name in _CATEGORIES.get(hazard, ())))


def hazards_of(categories: Iterable[str]) -> tuple[str, ...]:
    """The hazards for these categories of OpenAI, each once."""
    return tuple(dict.fromkeys(code for category in categories for code in _HAZARDS.get(category, ())))
