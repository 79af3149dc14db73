"""A keyword filter, the simplest baseline. The list was written without looking at any row."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from torch import Tensor

STEMS = (
    r"abus(?:e|ing)",
    r"assassinat",
    r"attack",
    r"behead",
    r"blackmail",
    r"bomb",
    r"bull(?:y|ying)",
    r"burgl",
    r"child porn",
    r"cocaine",
    r"counterfeit",
    r"credit card number",
    r"cyberattack",
    r"ddos",
    r"deepfake",
    r"defam",
    r"dox",
    r"embezzl",
    r"evade (?:taxes|police)",
    r"explosive",
    r"extort",
    r"fake id",
    r"fraud",
    r"genocid",
    r"grenade",
    r"hack",
    r"harass",
    r"hate speech",
    r"heroin",
    r"hijack",
    r"hitman",
    r"human traffick",
    r"identity theft",
    r"illegal",
    r"kidnap",
    r"kill",
    r"launder",
    r"malware",
    r"manipulat",
    r"massacre",
    r"meth(?:amphetamine)?\b",
    r"murder",
    r"nazi",
    r"phish",
    r"pipe bomb",
    r"pirat",
    r"poison",
    r"ponzi",
    r"porn",
    r"racis",
    r"ransom",
    r"rape",
    r"revenge",
    r"rob\b",
    r"scam",
    r"self-harm",
    r"sexist",
    r"shoplift",
    r"slur",
    r"smuggl",
    r"spyware",
    r"stalk",
    r"steal",
    r"suicide",
    r"terroris",
    r"threaten",
    r"tortur",
    r"virus",
    r"weapon",
)
_WORD = re.compile(rf"\b(?:{'|'.join(STEMS)})", re.IGNORECASE)

ABOUT = f"a list of {len(STEMS)} word stems; the score grows with the number of different ones in the text"


def score(texts: Sequence[str]) -> Tensor:
    """1 - 2 / (1 + different stems found): -1 for none, 0 for one, towards 1; [B]."""
    found = [len({match.group().lower() for match in _WORD.finditer(text)}) for text in texts]
    return torch.tensor([1.0 - 2.0 / (1 + count) for count in found], dtype=torch.float64)
