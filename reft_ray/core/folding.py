"""Letters in disguise: invisible characters and marks between them, and characters that look like Latin letters.

Each character is folded by itself to at most three others, so the work is linear and the result bounded, whatever the
text: normalising a whole text is neither (one Arabic ligature becomes 18 characters, long runs of marks are sorted).
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from functools import cache

# Letters that look Latin and have no compatibility form.
_LOOK_ALIKE = dict(
    zip(
        "аеорсухіјѕԁһӏԛԝкмтнвАВЕКМНОРСТХУІЈЅҮҺԌԚԜαεοριυνκτχγωηΑΒΕΖΗΙΚΜΝΟΡΤΥΧօսցհոɑɡɩɪʟɴʀʏᴀʙᴄᴅᴇɢʜᴊᴋᴍᴏᴘᴛᴜᴠᴡᴢꜰꜱꞯı",
        "aeopcyxijsdhlqwkmthbABEKMHOPCTXYIJSYHGQWaeopiuvktxywnABEZHIKMNOPTYXouqhnagiilnryabcdeghjkmoptuvwzfsqi",
        strict=True,
    )
)
for _first in (0x1F130, 0x1F150, 0x1F170, 0x1F1E6):  # squared, negative circled, negative squared, regional indicators
    _LOOK_ALIKE |= {chr(_first + _offset): letter for _offset, letter in enumerate(string.ascii_uppercase)}

# Ignorable or blank, although Unicode calls them letters, marks or symbols.
_BLANK = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0")
_HIDDEN = "\u200b"
_MARK = "\u0336"
_SPLIT_WORD = re.compile(f"[A-Za-z]{_HIDDEN}+[A-Za-z]")
_BURIED = re.compile(f"[A-Za-z]{_MARK}{{2}}")
_ACCENTED = re.compile("[A-Za-z][\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]")
_WORD = re.compile(r"[^\W\d_]+")
_STYLED = re.compile("[aA]{4,}|a{3,}")


def without_invisible(text: str) -> str | None:
    """The text without invisible characters and marks, if they disguise words of Latin letters."""
    if text.isascii() and text.isprintable():
        return None
    # A text has few different characters, and most have none of these: look at each once.
    if not any(_SHOWN[ord(character)] in (_HIDDEN, _MARK) for character in set(text)):
        return None
    shown = text.translate(_SHOWN)
    if _SPLIT_WORD.search(shown) or _BURIED.search(shown) or not all(map(_composes, set(_ACCENTED.findall(text)))):
        return visible(text)
    return None


def visible(text: str) -> str:
    """The text without invisible characters and marks; characters with an accent of their own stay."""
    return text.translate(_VISIBLE)


def hides(char: str) -> bool:
    """Whether a character may reorder or hide text that people read.

    Controls, format characters (direction, joiners, tags), private and unassigned ones.
    """
    return (not char.isascii() and unicodedata.category(char)[0] == "C") or char < " " or char == "\x7f"


def disguised(text: str) -> bool:
    """Whether words of a text mix scripts or are written in styled letters."""
    alike = [character for character in set(text) if not character.isascii() and _is_letter(_look(character))]
    if not alike:
        return False
    return _STYLED.search(text.translate(_STYLES)) is not None or any(map(_mixed, _WORD.findall(text)))


def plain_letters(text: str) -> str:
    """The text with every letter that looks like a Latin one replaced by it, accents dropped."""
    same = all(_PLAIN[ord(character)] == character for character in set(text))
    return text if same else text.translate(_PLAIN)


@cache
def _composes(pair: str) -> bool:
    """Whether a letter with a mark is an accented letter in two characters; no language strikes letters out."""
    return len(unicodedata.normalize("NFC", pair)) == 1


def _mixed(word: str) -> bool:
    """Whether a word has at least two ASCII letters and its other letters look like ASCII letters."""
    if word.isascii() or sum(map(str.isascii, word)) < 2:
        return False
    return all(letter.isascii() or _is_letter(_look(letter)) for letter in word)


def _is_letter(text: str) -> bool:
    return len(text) == 1 and text.isascii() and text.isalpha()


@cache
def _look(character: str) -> str:
    """The character that this one is a compatibility form of, or looks like."""
    form = unicodedata.normalize("NFKC", character)
    return _LOOK_ALIKE.get(form, form)


class _Table(dict[int, str | None]):
    """A translation table that is filled as characters are seen."""

    def __init__(self, entry: Callable[[str], str | None]) -> None:
        super().__init__()
        self._entry = entry

    def __missing__(self, code: int) -> str | None:
        self[code] = value = self._entry(chr(code))
        return value


def _is_hidden(character: str) -> bool:
    if character.isascii():
        return not character.isprintable() and character not in "\t\r\n"
    selector = "\ufe00" <= character <= "\ufe0f" or "\U000e0100" <= character <= "\U000e01ef"
    return character in _BLANK or selector or unicodedata.category(character) in ("Cc", "Cf", "Cn", "Co")


def _is_mark(character: str) -> bool:
    return unicodedata.category(character) in ("Mn", "Me")


def _shown(character: str) -> str:
    """Invisible characters and marks as one each."""
    return _HIDDEN if _is_hidden(character) else _MARK if _is_mark(character) else character


def _visible(character: str) -> str | None:
    """Nothing for invisible characters and marks."""
    return None if _is_hidden(character) or _is_mark(character) else character


def _style(character: str) -> str | None:
    """`a` and `A` for styled letters, a blank for all others, nothing for what is not seen. Greek and Cyrillic are
    scripts, not styles."""
    if _is_hidden(character):
        return None
    look = _look(character)
    if character.isascii() or not _is_letter(look) or "\u0370" <= character < "\u0590" or character == "ı":
        return " "
    return "a" if look.islower() else "A"


def _plain(character: str) -> str | None:
    """Latin letters without accents for all that look like them, nothing for what is not seen."""
    if _visible(character) is None:
        return None
    look = _look(character)
    base = "".join(part for part in unicodedata.normalize("NFKD", look) if not _is_mark(part))
    base = "".join(_LOOK_ALIKE.get(part, part) for part in base)
    # Ligatures become letters; words and formulas in one character stay one character.
    return base if len(base) == 1 or (len(base) <= 3 and base.isascii() and base.isalpha()) else character


_SHOWN, _VISIBLE, _STYLES, _PLAIN = map(_Table, (_shown, _visible, _style, _plain))
