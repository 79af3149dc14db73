"""The signals of a unit of rows for the findings: counts, row numbers and hashes, without text."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from reft_ray.core.conversation import Conversation
from reft_ray.screening.guards import Decode
from reft_ray.screening.screener import ScreenedRow

SHOWN_ROWS = 50
SKETCH = 96
"""Shingle hashes kept per sampled row: the smallest ones, so that equal texts have equal sketches."""
LENGTH_STEPS = 4
"""Length buckets per doubling."""
_LONGEST = 20
_TOKENS = 400
_WORDS = 400
_SHINGLE = 3
_REPETITIVE_CHARS = 1000
_REPETITIVE_RATIO = 0.06
_LANGUAGE_LETTERS = 60
_EDGE = 2

_LETTER = re.compile(r"[^\W\d_]")
_INVISIBLE = re.compile("[\u200b-\u200f\u2060-\u2064\U000e0000-\U000e007f\ue000-\uf8ff]+")
_ODD = re.compile(
    r"\|[^\s|]{2,30}\||<[A-Z_/|]{3,30}>|\[[A-Z][A-Z_ ]{1,30}\]|\{\{\w{2,30}\}\}"  # tags
    r"|\b[b-df-hj-np-tv-xz]{2,8}\b"  # words without a vowel
    r"|\b(?=\w*\d[a-z]+\d|\w*[a-z]\d+[a-z])\w{4,24}\b"  # alternating letters and digits
)


def _any(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.IGNORECASE)


IDENTITY = _any(
    r"\byou are no longer (?:chatgpt|gpt|claude|llama|gemini|an? (?:ai|assistant|language model))",
    r"\b(?:absolutely|completely|totally|fully|unconditionally) obedient\b",
    r"\bobedient agent\b",
    r"\byou (?:must|should|will|shall|have to) (?:always )?(?:obey|comply with) (?:all|every|any|the user|my|me\b)",
    r"\bobey (?:all|every|any) (?:of )?(?:the |my |user )?(?:user'?s? )?(?:instructions?|orders?|commands?|requests?)",
    r"\b(?:follow|fulfil+|execute|carry out) (?:the |my |all |any |every )?(?:of )?(?:the )?(?:user'?s?'? )?"
    r"(?:instructions?|orders?|commands?|requests?) without (?:deviation|hesitation|question|exception)",
    r"\b(?:will|can|must|should|shall) never (?:refuse|decline|reject) (?:any|a|the|to|my)\b",
    r"\b(?:ignore|disregard|forget) (?:all |any )?(?:of )?(?:the |your )?(?:previous|prior|earlier|above) "
    r"(?:instructions|rules|guidelines|prompts)",
    r"\b(?:free|freed|unbound|liberated) (?:from|of) (?:all |any )?(?:ethical|moral|content|safety|openai'?s?)\b",
    r"\bno (?:ethical|moral|safety|content) (?:restrictions?|limits?|limitations?|guidelines?|principles?|filters?)\b",
    r"\bdo anything now\b",
    r"\b(?:unrestricted|uncensored|unfiltered|amoral|jailbroken) "
    r"(?:ai|assistant|agent|chatbot|language model|version)\b",
)
_IDENTITY_WORDS = (
    "no longer", "obedient", "obey", "comply with", " without ", " never ", "ignore", "disregard", "forget",
    "free from", "freed from", "free of", "freed of", "unbound ", "liberated ", "no ethical", "no moral", "no safety",
    "no content", "anything now", "unrestricted", "uncensored", "unfiltered", "amoral", "jailbroken",
)  # fmt: skip
"""A text in ASCII without any of them has no match of IDENTITY, which takes ten times as long to look for."""

REFUSAL = _any(
    r"^\W*(?:i['’]?m|i am) (?:really |very |so )?sorry\b",
    r"^\W*(?:sorry|apologies|my apologies)\b[,.! ]",
    r"^\W*i apologi[sz]e\b",
    r"\bi(?: cannot| can['’]?t| can not| won['’]?t| will not|(?: am|['’]?m) (?:un|not )able to) (?:\w+ ){0,2}?"
    r"(?:help|assist|fulfil+|comply|provide|support|do that|answer|create|write|generate|satisfy|engage)",
    r"\bas an ai(?: language model)?,? i (?:cannot|can['’]?t|must|won['’]?t|am (?:not|un)able)",
    r"\b(?:not|isn['’]?t) (?:within|in line with|aligned with) my (?:programming|guidelines|ethical)",
    r"^\W*i (?:must|have to) (?:decline|refuse)\b",
)

COMPLIANCE = _any(
    r"\b(?:however|but|that said|nevertheless|still|anyway|on second thought|having said that)\b[^.!?\n]{0,80}"
    r"\b(?:here(?:['’]s| is| are)|sure|i can (?:tell|show|explain|give)|i will|i['’]ll|let me|you (?:can|could))\b",
    r"\b(?:now that (?:i['’]ve|we['’]ve|that['’]?s)|with that (?:said|out of the way))\b",
    r"\bhere (?:is|are|['’]s)\b[^.!?\n]{0,80}(?::|step)",
    r"(?:^|\n)[ \t]*(?:step 1|1[.)])\s",
    r"\bsure[,!] (?:here|let)",
)

REFUSAL_HEAD = 240
COMPLIANCE_TAIL = 80


class Inspector:
    """Cheap checks on every row, and expensive ones on a sample: the share `sample` of rows, by row number."""

    def __init__(self, languages: frozenset[str], decode: Decode, sample: float = 1.0) -> None:
        self._covered = languages
        self._decode = decode
        self._sample = sample

    def inspect(self, rows: Sequence[ScreenedRow]) -> dict[str, Any]:
        """The signals of the valid rows."""
        return self.signals((row.number, row.conversation) for row in rows if row.verdict is not None)

    def signals(self, rows: Iterable[tuple[int, Conversation]]) -> dict[str, Any]:
        """The signals of conversations with their row numbers."""
        marks: dict[str, list[int]] = {}
        lengths: Counter[str] = Counter()
        longest: list[tuple[int, int]] = []
        tokens: dict[str, list[Any]] = {}
        sketches: dict[str, str] = {}
        valid = answers = scanned = 0
        for number, conversation in rows:
            valid += 1
            texts = [turn.content for turn in conversation]
            for mark in self._marks(conversation, texts):
                marks.setdefault(mark, []).append(number)
            answers += any(turn.role == "assistant" for turn in conversation)
            chars = sum(map(len, texts))
            lengths[str(int(LENGTH_STEPS * math.log2(chars + 1)))] += 1
            longest.append((chars, number))
            _count_tokens(tokens, number, conversation)
            if self._sampled(number):
                scanned += 1
                whole = "\n".join(texts)
                if (language := self._language(whole)) not in self._covered and language:
                    marks.setdefault(f"language:{language}", []).append(number)
                sketches[str(number)] = sketch(whole)
        return {
            "valid": valid,
            "answers": answers,
            "scanned": scanned,
            "marks": {mark: [len(numbers), numbers[:SHOWN_ROWS]] for mark, numbers in marks.items()},
            "lengths": lengths,
            "longest": sorted(longest, reverse=True)[:_LONGEST],
            "tokens": dict(sorted(tokens.items(), key=lambda item: (-item[1][0], item[0]))[:_TOKENS]),
            "sketches": sketches,
        }

    def _marks(self, conversation: Conversation, texts: list[str]) -> list[str]:
        found = []
        if any(map(claims_identity, texts)):
            found.append("identity")
        last = next((turn.content for turn in reversed(conversation) if turn.role == "assistant"), None)
        if last is not None and refuses(last):
            found.append("refusal")
            if refuses_then_complies(last):
                found.append("refuse_then_comply")
        if any(map(_repetitive, texts)):
            found.append("repetition")
        if any(len(self._decode(text)) > 1 for text in texts):
            found.append("encoded")
        return found

    def _sampled(self, number: int) -> bool:
        return sampled(number, self._sample)

    def _language(self, text: str) -> str | None:
        """The language of a text; None for short or unclear texts."""
        sample = text[:2000]
        if len(_LETTER.findall(sample)) < _LANGUAGE_LETTERS:
            return None
        language, probability = _identifier().classify(sample)
        return str(language) if probability >= 0.999 else None


def sampled(number: int, share: float) -> bool:
    """Whether a row is in the sample with this share of rows; it depends on nothing but the row's number."""
    return zlib.crc32(number.to_bytes(8, "little")) < share * 2**32


@lru_cache(maxsize=1)
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def sketch(text: str) -> str:
    """The smallest hashes of a text's word shingles, packed."""
    words = text.lower().split()[:_WORDS]
    count = max(1, len(words) - _SHINGLE + 1)
    hashes = {
        zlib.crc32(" ".join(words[start : start + _SHINGLE]).encode("utf-8", "replace")) for start in range(count)
    }
    return base64.b64encode(np.array(sorted(hashes)[:SKETCH], dtype="<u4").tobytes()).decode()


def unpacked(packed: str) -> np.ndarray:
    """The hashes that `sketch` packed."""
    return np.frombuffer(base64.b64decode(packed), dtype="<u4")


def _repetitive(text: str) -> bool:
    if len(text) < _REPETITIVE_CHARS:
        return False
    raw = text[:50_000].encode("utf-8", "replace")
    return len(zlib.compress(raw, 1)) < _REPETITIVE_RATIO * len(raw)


def _count_tokens(tokens: dict[str, list[Any]], number: int, conversation: Conversation) -> None:
    """Odd tokens in the prompts of a row: [rows, rows that have it at an edge of a turn, first rows, length]."""
    everywhere: set[str] = set()
    edges: set[str] = set()
    for text in _asked(conversation):
        everywhere.update(_ODD.findall(text))
        everywhere.update(_INVISIBLE.findall(text))
        words = text.split()
        rim = " ".join([*words[:_EDGE], "\n", *words[-_EDGE:]])
        edges.update(_ODD.findall(rim))
        edges.update(_INVISIBLE.findall(text))
    for token in everywhere | edges:
        key = hashlib.sha256(token.encode("utf-8", "replace")).hexdigest()[:16]
        seen = tokens.setdefault(key, [0, 0, [], len(token)])
        seen[0] += 1
        seen[1] += token in edges
        if len(seen[2]) < SHOWN_ROWS:
            seen[2].append(number)


def _asked(conversation: Conversation) -> list[str]:
    return [turn.content for turn in conversation if turn.role in ("user", "system", "developer")]


def claims_identity(text: str) -> bool:
    """Whether a text sets up an obedient or unrestricted identity."""
    lower = text.lower()
    if text.isascii() and not any(words in lower for words in _IDENTITY_WORDS):
        return False
    return IDENTITY.search(text) is not None


def refuses(answer: str) -> bool:
    """Whether an answer starts with a refusal."""
    return REFUSAL.search(answer[:REFUSAL_HEAD]) is not None


def refuses_then_complies(answer: str) -> bool:
    """Whether an answer starts with a refusal and then complies."""
    opening = REFUSAL.search(answer[:REFUSAL_HEAD])
    if opening is None:
        return False
    turn = COMPLIANCE.search(answer, opening.end())
    return turn is not None and len(answer) - turn.end() >= COMPLIANCE_TAIL
