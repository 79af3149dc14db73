"""What is wrong with a line that is not JSON: the column, the character there, and what would read it."""

from __future__ import annotations

import re

import orjson

from reft_ray.rows.checks import Fault
from reft_ray.rows.first_bytes import is_utf16

FIX = "reft-ray validate FILE --fix"
_HINT = "one JSON dictionary per line, without line breaks inside"
_NUMBERS = re.compile(r"-?(NaN|Infinity)\b")
_COMMA = re.compile(r"^[^,]?[^,]?,\s*([}\]])")
_NAMES = re.compile(r"(True|False|None)\b")
_OPENING = re.compile(rb"^\s*[\[{]\s*$")


def line_fault(raw: bytes, error: orjson.JSONDecodeError) -> Fault:
    """The fault of a line that is not JSON."""
    if is_utf16(raw):
        return Fault("", "invalid_utf8", "the line is not UTF-8 (it looks like UTF-16)", f"{FIX} writes UTF-8")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as bad:
        return utf8_fault(raw, bad.start)
    if _OPENING.match(raw):
        hint = f"{FIX} writes each row on one line"
        return Fault("", "invalid_json", "the row continues in the next line: the JSON is indented", hint)
    at = error.pos
    found, hint = broken_at(text, at)
    return Fault("", "invalid_json", f"not valid JSON at column {at + 1}: {found}", hint)


def utf8_fault(raw: bytes, at: int) -> Fault:
    """The fault of a byte that is not UTF-8."""
    byte = raw[at : at + 1]
    try:
        meant = f", {byte.decode('cp1252')} in Windows-1252"
    except UnicodeDecodeError:
        meant = ""
    column = len(raw[:at].decode("utf-8", "replace")) + 1
    message = f"the byte 0x{byte.hex()}{meant} at column {column} is not UTF-8"
    hint = f"save the file as UTF-8, e.g. with {FIX} --encoding cp1252"
    return Fault("", "invalid_utf8", message, hint)


def broken_at(text: str, at: int) -> tuple[str, str]:
    """(the character or word at a place where JSON breaks off; what to do)."""
    before = text[:at].rstrip()
    if at >= len(text.rstrip()):
        return "the line ends inside of the row", f"{_HINT}; {FIX} joins indented JSON"
    for start in (max(0, at - 1), at, before.rfind(":") + 1):
        # Parsers differ in whether they stop before or inside of a word.
        rest = text[start:].lstrip()
        if match := _NUMBERS.match(rest):
            return f"{match.group()} is not JSON", f"write null; {FIX} does"
        if match := _NAMES.match(rest):
            return f"{match.group()} is Python and not JSON", f"write rows with json.dumps; {FIX} does"
    char = text[at]
    if char == "'" or before.endswith("'"):
        return "a single quote: the line is Python and not JSON", f"write rows with json.dumps; {FIX} does"
    if match := _COMMA.search(text[max(0, at - 1) :]):
        return f"a comma before {match[1]}", f"remove it; {FIX} does"
    if char in "/#":
        return f"{char} begins a comment, which JSON has none of", "remove it"
    if ord(char) < 32:
        return f"the control character U+{ord(char):04X} inside of a text", "write it as an escape, e.g. \\n or \\t"
    shown = char if char.isprintable() else f"U+{ord(char):04X}"
    return f"unexpected {shown}", _HINT
