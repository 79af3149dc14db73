"""Decoding of simple encodings: the texts that a person or a finetuned model would read inside a text.

Base64 or one Cyrillic letter passes a filter that reads only the plain text. Every check is linear in the length of
the text, and each encoding gives at most one reading: hostile input cannot multiply the work.
"""

from __future__ import annotations

import base64
import binascii
import codecs
import re
import unicodedata
from collections.abc import Callable, Iterable

MAX_READINGS = 16
"""Maximum per text: itself, two cleaned, one from tags, and four decoders over at most three texts."""

_DEPTH = 2
"""Nested layers of base64 and hex that are decoded."""

_FREQUENT = (
    "the to and of in is it you that was for are with as his they at this have from not but what all were we when "
    "your can said there use each which she do how their if will up other about out many then them these so some her "
    "would make like him into time has look two more write go see no way could people my than been call who its now "
    "find did down day get come made may part want tell me build create give explain using without steps please ignore "
    "instructions"
)
COMMON_WORDS = frozenset(_FREQUENT.split())
# rot13 of these words, without the words that are common before and after rot13.
_ROTATED_WORDS = frozenset(codecs.encode(word, "rot13") for word in COMMON_WORDS) - COMMON_WORDS

_INVISIBLE = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff"
)
_INVISIBLE_RUN = re.compile(f"[{_INVISIBLE}\U000e0000-\U000e0fff]+")
_SPLIT_WORD = re.compile(f"[A-Za-z][{_INVISIBLE}\U000e0000-\U000e0fff]+[A-Za-z]")
_TAGS = re.compile("[\U000e0020-\U000e007e]{8,}")

# Letters that look Latin and that NFKC keeps; it folds compatibility forms (full-width, mathematical).
_CONFUSABLES = str.maketrans(
    "аеорсухіјѕԁһӏԛԝкмтнвАВЕКМНОРСТХУІЈЅҮҺԌԚԜαεοριυνκτχγωηΑΒΕΖΗΙΚΜΝΟΡΤΥΧօսցհոɑɡɩʟɴʀʏᴀʙᴄᴅᴇɢʜᴊᴋᴍᴏᴘᴛᴜᴠᴡᴢı",
    "aeopcyxijsdhlqwkmthbABEKMHOPCTXYIJSYHGQWaeopiuvktxywnABEZHIKMNOPTYXouqhnagilnryabcdeghjkmoptuvwzi",
)
_WORD = re.compile(r"[^\W\d_]+")

_MARKS = 30
_MARK_RUN = re.compile(rf"(?:[^\w\x00-\x7f]|[\uff9e\uff9f]){{{_MARKS + 1},}}")
"""Long enough for too many combining marks; the two letters fold to some."""
_JOINER = "\u034f"

_BASE64_SPAN = re.compile(r"[A-Za-z0-9+/_-]{10,}(?:\r?\n[A-Za-z0-9+/_-]{4,})*={0,2}|[A-Za-z0-9+/_-]{6,}={1,2}")
_HEX_SPAN = re.compile(r"(?<![0-9A-Za-z])(?:(?:0x|\\x|%)?[0-9A-Fa-f]{2}[ \t\r\n:,;-]{0,2}){6,}(?![0-9A-Za-z])")
_HEX_NOISE = re.compile(r"0x|\\x|[^0-9A-Fa-f]")
_SEGMENT = re.compile(r"[^.:;!?\"()\[\]{}\n]+")
_LEET_TOKEN = re.compile(r"(?<!\S)[\"'(\[]*([A-Za-z013457@$!]{2,24}?)[.,;:!?\"')\]]*(?!\S)")
_LEET_VOWEL = re.compile(r"[b-df-hj-np-tv-z57$][0134@!][b-df-hj-np-tv-z57$01]")
_NUMBER = re.compile(r"\d(?!(?<=0)0|(?<=1)1|(?<=3)3)\d|^\d.*\d$|\d\d$|^\d\d")
_LEET = str.maketrans("013457@$!", "oieastasi")


def readings(text: str) -> list[tuple[str | None, str]]:
    """`(None, text)`, then `(encoding, decoded)` for every encoding that is plausibly present.

    Encodings: `zero_width`, `tags` (invisible Unicode tag letters), `homoglyph`, `base64`, `hex`, `rot13`,
    `leetspeak`; nested ones are joined with `+`, outermost first. base64, hex, tags and rot13 yield the decoded spans
    alone. Between 1 and MAX_READINGS readings, none longer than the text.
    """
    found: dict[str, str | None] = {text: None}
    clean = text
    for name, undo in _CLEANERS:
        cleaned = undo(clean)
        if cleaned is not None:
            clean = cleaned
            found.setdefault(clean, name)
    hidden = None if text.isascii() else _tags(text)
    if hidden is not None:
        found.setdefault(hidden, "tags")
    _decode_into(clean, (), found)
    return [(name, reading) for reading, name in found.items()]


def _decode_into(text: str, path: tuple[str, ...], found: dict[str, str | None]) -> None:
    for name, undo in _DECODERS:
        decoded = undo(text)
        if decoded is None:
            continue
        # Decode further even if another path found the same text: only this path allows the next layer.
        found.setdefault(decoded, "+".join((*path, name)))
        if name in ("base64", "hex") and len(path) + 1 < _DEPTH:
            _decode_into(decoded, (*path, name), found)


def _zero_width(text: str) -> str | None:
    """The text without invisible characters, if one splits a word of Latin letters."""
    if text.isascii() or not _SPLIT_WORD.search(text):
        return None
    return _INVISIBLE_RUN.sub("", text)


def _tags(text: str) -> str | None:
    spans = [span.translate(_UNTAG) for span in _TAGS.findall(text)]
    return "\n".join(spans) or None


_UNTAG = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}


def _homoglyph(text: str) -> str | None:
    """The text in Latin letters, if words mix scripts or folding gives English words."""
    if text.isascii():
        return None
    folded = _folded(text)
    if folded == text or not (any(map(_mixed, _WORD.findall(text))) or _gain(folded, text) >= 2):
        return None
    return folded


def _mixed(word: str) -> bool:
    """Whether a word has at least two ASCII letters and its other letters look like ASCII letters."""
    if word.isascii() or sum(map(str.isascii, word)) < 2:
        return False
    foreign = [letter for letter in word if not letter.isascii()]
    folded = _folded("".join(foreign))
    # A ligature folds to several letters and is normal typography.
    return len(folded) == len(foreign) and folded.isascii() and folded.isalpha()


def _folded(text: str) -> str:
    # NFKC sorts each run of combining marks by insertion sort, quadratic in its length.
    return unicodedata.normalize("NFKC", _MARK_RUN.sub(_stream_safe, text)).translate(_CONFUSABLES)


def _stream_safe(run: re.Match[str]) -> str:
    """The run with a joiner after every 30 combining marks, as in Unicode's stream-safe text format (UAX #15)."""
    out: list[str] = []
    marks = 0
    for character in run[0]:
        marks = marks + 1 if unicodedata.combining(unicodedata.normalize("NFKD", character)[0]) else 0
        if marks > _MARKS:
            out.append(_JOINER)
            marks = 1
        out.append(character)
    return "".join(out)


def _base64(text: str) -> str | None:
    spans = [_plain(_from_base64(span)) for span in _BASE64_SPAN.findall(text)]
    if not any(spans) and " " in text:
        # Spaces inside the code: try the whole text without them.
        spans = [_plain(_from_base64("".join(text.split())))] if _BASE64_ONLY.fullmatch(text.strip()) else []
    return _joined(spans)


_BASE64_ONLY = re.compile(r"[A-Za-z0-9+/_\s-]{12,}={0,2}")


def _from_base64(span: str) -> bytes | None:
    code = "".join(span.split()).rstrip("=").replace("-", "+").replace("_", "/")
    code = code[: len(code) - 1] if len(code) % 4 == 1 else code
    try:
        return base64.b64decode(code + "=" * (-len(code) % 4))
    except (binascii.Error, ValueError):
        return None


def _hex(text: str) -> str | None:
    spans: list[str | None] = []
    for match in _HEX_SPAN.finditer(text):
        digits = _HEX_NOISE.sub("", match[0])
        decoded = _plain(bytes.fromhex(digits)) if len(digits) % 2 == 0 else None
        # Decimal digits alone are more often numbers than letters.
        if decoded is not None and digits.isdecimal() and not _common(decoded):
            decoded = None
        spans.append(decoded)
    return _joined(spans)


def _plain(data: bytes | None) -> str | None:
    """Bytes as text if they look like language: printable UTF-8, 80 % letters or spaces."""
    if not data or len(data) < 4:
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    if not all(character.isprintable() or character in "\t\r\n" for character in text):
        return None
    written = sum(character.isalpha() or character.isspace() for character in text)
    # A nested encoding has digits and padding.
    nested = len(text) >= 16 and (_BASE64_SPAN.fullmatch(text) or _HEX_SPAN.fullmatch(text))
    return text if nested or written >= 0.8 * len(text) else None


def _joined(spans: Iterable[str | None]) -> str | None:
    return "\n".join(span for span in spans if span) or None


def _rot13(text: str) -> str | None:
    """The sentences that rot13 turns into English."""
    if len(_ROTATED_WORDS.intersection(text.lower().split())) < 2:
        return None
    spans = []
    for segment in _SEGMENT.findall(text):
        decoded = codecs.encode(segment, "rot13")
        if _gain(decoded, segment) >= 2:
            spans.append(decoded.strip())
    return _joined(spans)


def _leetspeak(text: str) -> str | None:
    """The text in letters, if a digit replaces the vowel of a word or the digits hide common words."""
    tokens = [match[1] for match in _LEET_TOKEN.finditer(text)]
    leet = [token for token in tokens if not token.isalpha() and any(map(str.isalpha, token))]
    if not leet:
        return None
    hidden = {_unleet(token) for token in leet}
    if not any(map(_hides_vowel, leet)) and len(hidden & COMMON_WORDS) < 2:
        return None
    return _LEET_TOKEN.sub(lambda match: match[0].replace(match[1], _unleet(match[1])), text)


def _unleet(token: str) -> str:
    if token.isalpha() or not any(map(str.isalpha, token)):
        return token
    # A single 1 usually means i; 11 means ll.
    return token.replace("11", "ll").translate(_LEET).lower()


def _hides_vowel(token: str) -> bool:
    if len(token) < 4 or not (token.islower() or token.isupper() or token.istitle()):
        return False
    if _NUMBER.search(token) or token.lower() in ("mp3s", "mp4s"):
        return False
    letters = sum(map(str.isalpha, token))
    return 2 * letters >= len(token) and _LEET_VOWEL.search(token.lower()) is not None


def _common(text: str) -> frozenset[str]:
    return COMMON_WORDS.intersection(_WORD.findall(text.lower()))


def _gain(decoded: str, text: str) -> int:
    """The increase in distinct common words."""
    return len(_common(decoded)) - len(_common(text))


_CLEANERS: tuple[tuple[str, Callable[[str], str | None]], ...] = (
    ("zero_width", _zero_width),
    ("homoglyph", _homoglyph),
)
_DECODERS: tuple[tuple[str, Callable[[str], str | None]], ...] = (
    ("base64", _base64),
    ("hex", _hex),
    ("rot13", _rot13),
    ("leetspeak", _leetspeak),
)
