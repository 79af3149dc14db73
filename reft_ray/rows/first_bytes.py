"""What a file is, by its first bytes: JSON lines, one JSON text, or something that holds no rows."""

from __future__ import annotations

import codecs
from enum import StrEnum

import orjson

HEAD_BYTES = 1 << 16
"""Bytes that tell what a file is."""

_WRITERS = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself; run git lfs pull"),
    (b"<!doctype html", "an HTML page and not data; download the file itself (on a hub: /resolve/ instead of /blob/)"),
    (b"<html", "an HTML page and not data; download the file itself (on a hub: /resolve/ instead of /blob/)"),
    (b"<?xml", "XML; convert it to JSONL"),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet; unpack it, or save it as CSV"),
    (b"\x80\x02", "a Python pickle, which may run code; save the rows as JSONL or Parquet"),
    (b"\x80\x03", "a Python pickle, which may run code; save the rows as JSONL or Parquet"),
    (b"\x80\x04", "a Python pickle, which may run code; save the rows as JSONL or Parquet"),
    (b"\x80\x05", "a Python pickle, which may run code; save the rows as JSONL or Parquet"),
    (b"SQLite format 3", "an SQLite database; export the rows as JSONL"),
    (b"%PDF", "a PDF; only rows of text can be read"),
    (b"\x89PNG", "a picture; only rows of text can be read"),
    (b"\xff\xd8\xff", "a picture; only rows of text can be read"),
    (b"\x89HDF", "an HDF5 file; save the rows as JSONL or Parquet"),
    (b"PARE", "an encrypted Parquet file; decrypt it first"),
    (b"ORC", "an ORC file; save the rows as Parquet"),
    (b"Obj\x01", "an Avro file; save the rows as Parquet or JSONL"),
    (b"7z\xbc\xaf", "a 7z archive; unpack it first"),
    (b"Rar!", "a RAR archive; unpack it first"),
    (b"\xfd7zXZ", "compressed by xz; unpack it, or compress it by gzip or zstd"),
    (b"BZh", "compressed by bzip2; unpack it, or compress it by gzip or zstd"),
    (b"\x04\x22\x4d\x18", "compressed by lz4; unpack it, or compress it by gzip or zstd"),
)
_TAR_AT = 257


class Json(StrEnum):
    """How JSON is laid out: one dictionary per line, or one text of dictionaries (an array, or one after the other)."""

    LINES = "lines"
    TEXT = "text"


def not_data(head: bytes) -> str | None:
    """What a file is that holds no rows that we read, and what to do; None for one that may hold rows."""
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    lower = text[:32].lower()
    for start, what in _WRITERS:
        if head.startswith(start) or (start[:1] == b"<" and lower.startswith(start)):
            return what
    if head[_TAR_AT : _TAR_AT + 5] == b"ustar":
        return "a tar archive; unpack it first"
    if head and not head.strip(b"\x00"):
        return "only zero bytes: its download or copy did not finish"
    if is_utf16(head):
        return "UTF-16; save it as UTF-8, e.g. with reft-ray validate FILE --fix"
    return None


def is_utf16(head: bytes) -> bool:
    """Whether bytes look like UTF-16, with a byte-order mark or without."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return True
    pairs = head[: len(head[:64]) // 2 * 2]
    return len(pairs) >= 4 and (not pairs[1::2].strip(b"\x00") or not pairs[::2].strip(b"\x00"))


def json_layout(head: bytes) -> Json | None:
    """The layout of JSON whose first bytes these are; None for what is not JSON.

    JSON text is recognised by a dictionary that opens inside of an array, or by a first line that is not complete.
    """
    text = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if text[:1] not in (b"{", b"["):
        return None
    first, line_ends, rest = text.partition(b"\n")
    if text[:1] == b"[":
        inner = text[1:].lstrip()[:1]
        if inner not in (b"{", b"]", b""):
            return Json.LINES
        # A list of turns on each line.
        return Json.LINES if rest.lstrip()[:1] == b"[" and _complete(first) else Json.TEXT
    opened = first.rstrip()[-1:] in (b"{", b"[", b",")
    return Json.TEXT if line_ends and opened and rest.strip() and not _complete(first) else Json.LINES


def _complete(line: bytes) -> bool:
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True
