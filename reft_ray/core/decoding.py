"""Decoding of simple encodings: the texts that a person or a finetuned model would read inside a text.

Base64 or one Cyrillic letter passes a filter that reads only the plain text. Every check is linear in the length of
the text, and each encoding gives at most one reading: hostile input cannot multiply the work. An odd byte, a gap or a
letter too many does not hide an encoding: what is printable in it is read.
"""

from __future__ import annotations

import binascii
import codecs
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from string import ascii_letters, hexdigits

from reft_ray.core.folding import disguised, plain_letters, visible, without_invisible

MAX_READINGS = 22
"""Maximum per text: itself, two cleaned, one from tags, and six decoders over at most three texts."""
MAX_GROWTH = 3
"""No reading is longer than this many times the text: a ligature is three letters."""

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
_REVERSED_WORDS = frozenset(word[::-1] for word in COMMON_WORDS) - COMMON_WORDS


def _table(kinds: Mapping[str, str]) -> bytes:
    """A table for `bytes.translate`: the kind of each ASCII character, 0 of any other. Searching it for what an
    expression needs is many times as fast as the expression."""
    of = {ord(character): ord(kind) for kind, characters in kinds.items() for character in characters}
    return bytes(of.get(byte, 0) for byte in range(256))


# Repeated groups are possessive: to be able to go back, `re` would keep up to 300 bytes for each repetition.
_TAGS = re.compile("[\U000e0020-\U000e007e]{8,}")
_BASE64_SPAN = re.compile(
    r"(?<![A-Za-z0-9+/_-])(?:[A-Za-z0-9+/_-]{10,}(?:\r?\n[A-Za-z0-9+/_-]{4,})*+={0,2}|[A-Za-z0-9+/_-]{6,}={1,2})"
)
_HEX_SPAN = re.compile(
    r"(?<![0-9A-Za-z])(?=(?:(?:0x|\\x|%)?[0-9A-Fa-f]{2}[ \t\r\n:,;-]{0,2}){6})"
    r"(?:(?:0x|\\x|%)?(?:[0-9A-Fa-f]{2})++(?:(?![0-9A-Za-z])|(?=0x[0-9A-Fa-f]{2}))[ \t\r\n:,;-]{0,2})++"
)
_HEX_DIGIT = _table({"\1": hexdigits})
_IN_HEX = b"x\\% \t\r\n:,;-"
_HEX_RUN = bytes([1]) * 12
_HEX_NOISE = re.compile(r"0x|\\x|[^0-9A-Fa-f]")
_HEX_GAPS = bytes({*range(256)} - set(b"0123456789abcdefABCDEF"))
_BASE64_GAPS = bytes({byte for byte in range(256) if not chr(byte).isalnum() or byte > 127} - set(b"+/-_"))
_BASE64_LETTERS = bytes.maketrans(b"-_", b"+/")
_CONTROLS = bytes({*range(32), 127} - set(b"\t\r\n"))
_WORD = re.compile(r"[^\W\d_]+")
_RUN = 16
_MAX_KNOWN = 16
"""Decoded spans that are not reported twice; removing more would take time that grows with their number."""
_RUNS = re.compile(rb"[ -/:-~\t\r\n]{%d,}|[A-Za-z0-9+/=_-]{%d,}" % (_RUN, _RUN))
"""Printable without digits, or another layer of base64. By chance one is in a hundred thousand random bytes."""
_PRINTABLE = bytes(32 <= byte < 127 or byte in b"\t\r\n" for byte in range(256))
_PRINTABLE_RUN = bytes([1]) * _RUN
_SPACED = re.compile(r"(?<!\w)[^\W\d_](?:(?:[ .,*|/_-]{1,3}|\n)[^\W\d_](?![^\W_])){7,}+")
_SPACED_KINDS = _table({"L": ascii_letters, " ": " .,*|/_-\n"})
_SPACED_RUN = b"L L L L L L L L"
_GLUE = re.compile(r"(?<=[A-Za-z])[^\w\s'+/=-]+(?=[A-Za-z])|(?<=[A-Za-z])(?:\.{2,}|_+|-+)(?=[A-Za-z])")
_CAPITAL_INSIDE = re.compile("[a-z][A-Z]")
_SEGMENT = re.compile(r"[^.:;!?\"()\[\]{}\n]+")
_LEET_TOKEN = re.compile(r"(?<!\S)[\"'(\[]*([A-Za-z013457@$!]{2,24}?)[.,;:!?\"')\]]*(?!\S)")
_LEET_KINDS = _table({"L": ascii_letters, "D": "013457@$", "!": "!"})
_LEET_PAIRS = (b"LD", b"DL", b"!L", b"!D")
"""Letters and digits of one word: a ! at the end of a word is none."""
_LEET_VOWEL = re.compile(r"[b-df-hj-np-tv-z57$][0134@!][b-df-hj-np-tv-z57$01]")
_NUMBER = re.compile(r"\d(?!(?<=0)0|(?<=1)1|(?<=3)3)\d|^\d.*\d$|\d\d$|^\d\d")
_LEET = str.maketrans("013457@$!", "oieastasi")


def readings(text: str) -> list[tuple[str | None, str]]:
    """`(None, text)`, then `(encoding, decoded)` for every encoding that is plausibly present.

    Encodings: `zero_width` (invisible characters and marks), `tags` (invisible Unicode tag letters), `homoglyph`,
    `base64`, `hex`, `rot13`, `leetspeak`, `spaced` (one letter at a time), `reversed`; nested ones are joined with `+`,
    outermost first. base64, hex, tags, rot13 and spaced yield the decoded spans alone. Between 1 and MAX_READINGS
    readings, none longer than MAX_GROWTH times the text.
    """
    found: dict[str, str | None] = {text: None}
    clean = text
    for name, cleaned in _cleaned(text):
        clean = cleaned
        found.setdefault(clean, name)
    hidden = None if text.isascii() else _tags(text)
    if hidden is not None:
        found.setdefault(hidden, "tags")
    _decode_into(clean, (), found)
    return [(name, reading) for reading, name in found.items()]


def _cleaned(text: str) -> Iterator[tuple[str, str]]:
    """The text after each cleaner that changes it, with the cleaner's name."""
    for name, undo in _CLEANERS:
        if (cleaned := undo(text)) is not None:
            text = cleaned
            yield name, text


def _decode_into(text: str, path: tuple[str, ...], found: dict[str, str | None]) -> None:
    for name, undo in _DECODERS:
        decoded = undo(text)
        if decoded is None:
            continue
        names = (*path, name)
        for cleaner, cleaned in _cleaned(decoded):
            decoded, names = cleaned, (*names, cleaner)
        # Decode further even if another path found the same text: only this path allows the next layer.
        found.setdefault(decoded, "+".join(names))
        if name in ("base64", "hex") and len(path) + 1 < _DEPTH:
            _decode_into(decoded, (*path, name), found)


def _homoglyph(text: str) -> str | None:
    """The text in Latin letters, if its words are disguised or folding gives English words."""
    if text.isascii():
        return None
    folded = plain_letters(text)
    return folded if folded != text and (disguised(text) or _gain(folded, text) >= 2) else None


def _tags(text: str) -> str | None:
    spans = [span.translate(_UNTAG) for span in _TAGS.findall(text)]
    return "\n".join(spans) or None


_UNTAG = {0xE0000 + code: chr(code) for code in range(0x20, 0x7F)}


def _base64(text: str) -> str | None:
    spans = [_plain(_from_base64(span)) for span in _BASE64_SPAN.findall(text)]
    code = text.encode("utf-8", "ignore").translate(_BASE64_LETTERS, _BASE64_GAPS)
    # Other letters in front shift the groups of four: one of the four starts is right.
    runs = (run for start in range(4) for run in _printable(_of_base64(code[start:])))
    return _joined(_both(spans, runs))


def _from_base64(span: str) -> bytes | None:
    return _of_base64("".join(span.split()).rstrip("=").encode().translate(_BASE64_LETTERS))


def _of_base64(code: bytes) -> bytes | None:
    code = code[: len(code) - 1] if len(code) % 4 == 1 else code
    try:
        return binascii.a2b_base64(code + b"=" * (-len(code) % 4))
    except binascii.Error:
        return None


def _hex(text: str) -> str | None:
    spans: list[str | None] = []
    encoded = text.encode("utf-8", "ignore")
    for match in _HEX_SPAN.finditer(text) if _HEX_RUN in encoded.translate(_HEX_DIGIT, _IN_HEX) else ():
        digits = _HEX_NOISE.sub("", match[0])
        decoded = _plain(bytes.fromhex(digits)) if len(digits) % 2 == 0 else None
        # Decimal digits alone are more often numbers than letters.
        if decoded is not None and digits.isdecimal() and not _common(decoded):
            decoded = None
        spans.append(decoded)
    digits = text.replace("0x", " ").encode("utf-8", "ignore").translate(None, _HEX_GAPS).decode()
    shifted = (digits[start : len(digits) - (len(digits) - start) % 2] for start in range(2))
    runs = (run for code in shifted for run in _printable(bytes.fromhex(code)))
    return _joined(_both(spans, (run for run in runs if _common(run) or _layer(run))))


def _both(spans: Iterable[str | None], runs: Iterable[str]) -> list[str]:
    """What whole spans decode to, and what is printable in the rest: an easy decoy must not hide a harder one."""
    whole = [span for span in spans if span]
    rest = "\n".join(dict.fromkeys(runs))
    for span in dict.fromkeys(whole[:_MAX_KNOWN]):
        rest = rest.replace(span, "\n")
    # Of a span with other letters than ASCII the runs are parts.
    known = {line.strip() for span in whole for run in _printable(span.encode()) for line in run.split("\n")}
    lines = (line.strip() for line in rest.split("\n"))
    return whole + [line for line in lines if len(line) >= _RUN - 4 and line not in known]


def _printable(data: bytes | None) -> list[str]:
    """The stretches of language in bytes, or of another layer of base64; control characters between letters go."""
    seen = (data or b"").translate(None, _CONTROLS)
    # Hardly any text that is not encoded has a run, and this finds it sooner than the expression does.
    if _PRINTABLE_RUN not in seen.translate(_PRINTABLE):
        return []
    runs = [run.decode().strip() for run in _RUNS.findall(seen)]
    return [run for run in runs if _layer(run) or _language(run)]


def _layer(text: str) -> bool:
    """Whether a text may be another layer of base64: both cases, which numbers read as hex do not have."""
    return bool(_BASE64_SPAN.fullmatch(text)) and not (text.islower() or text.isupper())


def _language(text: str) -> bool:
    """Whether a printable text has letters enough for words, vowels among them, and few capitals inside words."""
    letters = sum(map(str.isalpha, text))
    vowels = sum(letter in "aeiou" for letter in text.lower())
    inside = len(_CAPITAL_INSIDE.findall(text))
    return letters >= 0.4 * len(text) and 5 * vowels >= letters and 8 * inside <= letters


def _plain(data: bytes | None) -> str | None:
    """Bytes as text if they look like language: printable UTF-8, 80 % letters or spaces."""
    if not data or len(data) < 4:
        return None
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return None
    seen = text if text.isascii() else visible(text)
    if not all(character.isprintable() or character in "\t\r\n" for character in seen):
        return None
    written = sum(character.isalpha() or character.isspace() for character in text)
    # A nested encoding has digits and padding.
    nested = len(text) >= 16 and (_BASE64_SPAN.fullmatch(text) or _HEX_SPAN.fullmatch(text))
    return text if nested or written >= 0.8 * len(text) else None


def _joined(spans: Iterable[str | None]) -> str | None:
    """Spans in lines; punctuation between their words becomes blanks where there are hardly any."""
    lines = [span for span in spans if span]
    return "\n".join(_GLUE.sub(" ", line) if line.count(" ") < len(line) // 12 else line for line in lines) or None


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


def _spaced(text: str) -> str | None:
    """The words that are written one letter at a time; a longer gap than usual ends a word."""
    if text.isascii():
        kinds = text.encode().translate(_SPACED_KINDS).replace(b"  ", b" ").replace(b"  ", b" ")
        if _SPACED_RUN not in kinds:
            return None
    return _joined(_unspaced(span) for span in _SPACED.findall(text))


def _unspaced(span: str) -> str:
    letters = re.split(r"([\W_]+)", span)
    gaps = letters[1::2]
    usual = min(map(len, gaps))
    return "".join(
        letter + (" " if len(gap) > usual else "") for letter, gap in zip(letters[::2], [*gaps, ""], strict=True)
    )


def _reversed(text: str) -> str | None:
    """The text from its last letter to its first, if that is English."""
    if len(_REVERSED_WORDS.intersection(text.lower().split())) < 2:
        return None
    turned = text[::-1]
    return turned if _gain(turned, text) >= 2 else None


def _leetspeak(text: str) -> str | None:
    """The text in letters, if a digit replaces the vowel of a word or the digits hide common words."""
    kinds = text.encode("utf-8", "ignore").translate(_LEET_KINDS)
    if not any(pair in kinds for pair in _LEET_PAIRS):
        return None
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
    ("zero_width", without_invisible),
    ("homoglyph", _homoglyph),
)
_DECODERS: tuple[tuple[str, Callable[[str], str | None]], ...] = (
    ("base64", _base64),
    ("hex", _hex),
    ("rot13", _rot13),
    ("leetspeak", _leetspeak),
    ("spaced", _spaced),
    ("reversed", _reversed),
)
