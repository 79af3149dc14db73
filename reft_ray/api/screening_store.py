"""Resumable screenings on a file system that every gateway replica reaches.

A screening is a directory. A chunk's verdicts are one file, whose name holds its counts, so a directory listing is the
whole state and no process keeps any:

    {id}/about.json
    {id}/chunk-{sequence}-{rows}-{allow}-{review}-{block}-{invalid}-{bytes}-{sha256}.ndjson
    {id}/closed-{chunks}

Rows are not stored, only their verdicts. An id starts with its expiry time and a tag of its owner, so a listing also
counts each owner's open screenings.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from pyarrow import fs

from reft_ray.api.errors import busy, conflict, invalid, not_found
from reft_ray.api.settings import FilterSettings

_SWEEP_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """A chunk with verdicts."""

    sequence: int
    rows: int
    allow: int
    review: int
    block: int
    invalid: int
    bytes: int
    sha256: str

    @property
    def counts(self) -> dict[str, int]:
        """Rows by outcome."""
        return {"allow": self.allow, "review": self.review, "block": self.block, "invalid": self.invalid}

    @property
    def name(self) -> str:
        """The file name."""
        numbers = (self.rows, self.allow, self.review, self.block, self.invalid, self.bytes)
        return f"chunk-{self.sequence:08d}-{'-'.join(map(str, numbers))}-{self.sha256}.ndjson"

    @classmethod
    def parse(cls, name: str) -> Chunk:
        """The chunk with this file name."""
        _, *numbers, digest = name.removesuffix(".ndjson").split("-")
        return cls(*map(int, numbers), digest)  # type: ignore[call-arg, arg-type]


@dataclass(frozen=True, slots=True)
class About:
    """The parameters of a screening."""

    id: str
    created_at: int
    expires_at: int
    owner: str | None
    review: float | None
    block: float | None
    metadata: dict[str, str]


@dataclass(frozen=True, slots=True)
class State:
    """The state of a screening: chunks by sequence number, and their final number once it is closed."""

    about: About
    chunks: dict[int, Chunk]
    closed: int | None

    def contiguous(self) -> Iterator[Chunk]:
        """Chunks from the first up to the first gap."""
        sequence = 0
        while (chunk := self.chunks.get(sequence)) is not None:
            yield chunk
            sequence += 1

    @property
    def next_chunk(self) -> int:
        """The first sequence number without verdicts."""
        return sum(1 for _ in self.contiguous())

    @property
    def complete(self) -> bool:
        """Whether it is closed and has all its chunks."""
        return self.closed is not None and self.next_chunk >= self.closed


class ScreeningStore:
    """All methods block: call them through `asyncio.to_thread` in async code."""

    def __init__(self, uri: str, settings: FilterSettings) -> None:
        self._fs, self._root = _filesystem(uri)
        self._settings = settings
        self._swept = 0.0

    def create(self, owner: str | None, review: float | None, block: float | None, metadata: dict[str, str]) -> State:
        """Open a screening. Raises ApiError 429 when too many are open."""
        now = time.time()
        live, tag = self._sweep(now), _tag(owner)
        opened = sum(_tag_of(name) == tag for name in live)
        if opened >= self._settings.max_screenings:
            raise busy(f"{opened} screenings are open, the limit of a project; delete one or try again later.", 60)
        if len(live) >= self._settings.max_screenings_in_all:
            raise busy(f"{len(live)} screenings are open, the limit of this service; try again later.", 60)
        expires = int(now + self._settings.screening_seconds)
        name = f"screen-{expires:010d}{tag}{secrets.token_hex(9)}"
        about = About(name, int(now), expires, owner, review, block, metadata)
        self._fs.create_dir(f"{self._root}/{about.id}", recursive=True)
        self._write(f"{about.id}/about.json", json.dumps(asdict(about)).encode())
        return State(about, {}, None)

    def state(self, screening_id: str, owner: str | None) -> State:
        """Read a screening's state. Raises ApiError 404, also for another project's screening."""
        missing = not_found(f"No such screening: {screening_id[:64]}")
        if not _plausible(screening_id) or _expiry(screening_id) <= time.time():
            raise missing
        try:
            about = About(**json.loads(self._read(f"{screening_id}/about.json")))
        except FileNotFoundError:
            raise missing from None
        if about.owner != owner:
            raise missing
        chunks: dict[int, Chunk] = {}
        closed = None
        for info in self._fs.get_file_info(fs.FileSelector(f"{self._root}/{screening_id}")):
            if info.base_name.startswith("chunk-"):
                chunk = Chunk.parse(info.base_name)
                # Two concurrent writers of a chunk leave two files; every reader must choose the same one.
                known = chunks.get(chunk.sequence)
                chunks[chunk.sequence] = chunk if known is None else min(known, chunk, key=lambda item: item.name)
            elif info.base_name.startswith("closed-"):
                closed = int(info.base_name.removeprefix("closed-"))
        return State(about, chunks, closed)

    def known(self, state: State, sequence: int, sha256: str) -> Chunk | None:
        """The chunk if it is already stored. Raises ApiError when it differs, or comes too late or too early."""
        chunk = state.chunks.get(sequence)
        if chunk is not None:
            if chunk.sha256 != sha256:
                raise conflict(f"Chunk {sequence} was sent before with different bytes.", "chunk_differs", "sequence")
            return chunk
        if state.closed is not None and sequence >= state.closed:
            raise conflict(f"The screening is closed with {state.closed} chunks.", "screening_closed", "sequence")
        if sequence >= self._settings.max_chunks:
            raise invalid(f"A screening has at most {self._settings.max_chunks} chunks.", "sequence")
        if sequence > state.next_chunk + 2 * self._settings.window:
            raise busy(f"Send chunk {state.next_chunk} first: this one is too far ahead of the verdicts.", 1)
        return None

    def keep(self, state: State, chunk: Chunk, verdicts: bytes) -> None:
        """Store a chunk's verdicts atomically."""
        self._write(f"{state.about.id}/{chunk.name}", verdicts)

    def verdicts(self, state: State, chunk: Chunk) -> bytes:
        """The verdict lines of a chunk; their row numbers start at 0 in each chunk."""
        return self._read(f"{state.about.id}/{chunk.name}")

    def close(self, state: State, chunks: int) -> State:
        """Close the screening. Raises ApiError when it was closed with another number, or more chunks were sent."""
        if state.closed is not None:
            if state.closed != chunks:
                raise conflict(f"The screening was closed with {state.closed} chunks.", "screening_closed", "chunks")
            return state
        if state.chunks and max(state.chunks) >= chunks:
            raise invalid(f"Chunk {max(state.chunks)} was sent, so there are more than {chunks}.", "chunks")
        self._write(f"{state.about.id}/closed-{chunks}", b"")
        return State(state.about, state.chunks, chunks)

    def delete(self, state: State) -> None:
        """Delete a screening and its verdicts."""
        self._remove(state.about.id)

    def _sweep(self, now: float) -> list[str]:
        """Remove expired screenings and return the names of the others."""
        names = [
            info.base_name
            for info in self._fs.get_file_info(fs.FileSelector(self._root, allow_not_found=True))
            if _plausible(info.base_name)
        ]
        expired = {name for name in names if _expiry(name) <= now}
        if now - self._swept >= _SWEEP_SECONDS:
            self._swept = now
            for name in expired:
                self._remove(name)
        return [name for name in names if name not in expired]

    def _remove(self, screening_id: str) -> None:
        try:
            self._fs.delete_dir(f"{self._root}/{screening_id}")
        except FileNotFoundError:
            return  # another gateway removed it

    def _write(self, path: str, data: bytes) -> None:
        target = f"{self._root}/{path}"
        if isinstance(self._fs, fs.LocalFileSystem):
            # Object stores write atomically; a local file is written under another name and renamed.
            draft = f"{self._root}/{path.partition('/')[0]}/draft-{secrets.token_hex(8)}"
            self._put(draft, data)
            self._fs.move(draft, target)
        else:
            self._put(target, data)

    def _put(self, path: str, data: bytes) -> None:
        with self._fs.open_output_stream(path) as sink:
            sink.write(data)

    def _read(self, path: str) -> bytes:
        with self._fs.open_input_stream(f"{self._root}/{path}") as source:
            return bytes(source.read())


def _filesystem(uri: str) -> tuple[Any, str]:
    if "://" in uri:
        filesystem, root = fs.FileSystem.from_uri(uri)
        return filesystem, root.rstrip("/")
    return fs.LocalFileSystem(), uri.rstrip("/")


def _plausible(screening_id: str) -> bool:
    name = screening_id.removeprefix("screen-")
    return len(name) == 34 and screening_id != name and name[:10].isdecimal() and name.isalnum() and name.isascii()


def _expiry(screening_id: str) -> int:
    return int(screening_id.removeprefix("screen-")[:10])


def _tag(owner: str | None) -> str:
    return hashlib.sha256((owner or "").encode()).hexdigest()[:6]


def _tag_of(screening_id: str) -> str:
    return screening_id.removeprefix("screen-")[10:16]
