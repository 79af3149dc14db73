"""The rows of an upload as a Ray dataset, while it arrives; the client waits while the pipeline is busy."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import threading
import warnings
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import Datasource, ExecutionResources, ReadTask
from ray.data.block import BlockMetadata
from ray.exceptions import RayError

from reft_ray.core.errors import ReftError, UsageError
from reft_ray.data.read import LONGEST_ROW, ROWS, line_reader, table_of
from reft_ray.local_ray import ensure_ray
from reft_ray.rows.first_bytes import HEAD_BYTES, Json, json_layout, not_data
from reft_ray.rows.format import Format
from reft_ray.rows.reader import RowReader
from reft_ray.screening.sources import COMPRESSION_MAGIC

HELD_BYTES = 8 << 20
"""Bytes that wait between the sender and the pipeline."""
BLOCK_BYTES = 512 << 10
"""Of the tables that Ray Data passes on, in which a row takes two to four times its bytes; it collects smaller ones."""
IN_FLIGHT_BYTES = 128 << 20
"""In Ray's object store, for one dataset; its own limit is a share of the store, which an upload would fill first."""
_PIECE_BYTES = 1 << 20
_SENDING: set[asyncio.Task[None]] = set()
"""Event loops keep weak references to their tasks."""
_STORED_FIRST = ((b"PAR1", "Parquet"), (b"ARROW1", "Arrow"), *COMPRESSION_MAGIC)


def arriving_rows(
    chunks: Iterable[bytes] | AsyncIterable[bytes],
    name: str = "upload",
    *,
    format: Format | str | None = None,
    columns: Mapping[str, str] | None = None,
    speakers: Mapping[str, str] | None = None,
    control_tokens: Sequence[str] = (),
    judging: bool = False,
    **options: Any,
) -> ray.data.Dataset:
    """The rows of JSONL that is still being received, with the schema ROWS (lines counted); it can be read once.

    Rows are passed on once they fill BLOCK_BYTES, and at the end. `chunks` are pieces of bytes of any size: a response
    that is downloaded, a file that grows, or the body of a request. An asynchronous source is read by the event loop
    that calls this, so consume the dataset in a thread. At most HELD_BYTES wait to be read; then no further chunk is
    asked for. `judging` reads rows that are not trained on, such as prompts or texts alone, and leaves `messages` null.
    The other arguments are those of `read_rows`.

    The dataset raises ReftError where `chunks` fails, UsageError for other files than JSONL and for a row of more than
    LONGEST_ROW bytes, and Ray's WorkerCrashedError where the worker that reads is lost: bytes that have been taken
    cannot be read again, and no row is left out in silence. Rows before the error have been passed on.
    """
    ensure_ray()
    reader = RowReader(Format(format) if format else None, columns, control_tokens, judging, speakers)
    waiting = ray.remote(num_cpus=0)(_Waiting).remote(HELD_BYTES)
    source = _ArrivingSource(partial(_tables, waiting, name, reader))
    if isinstance(chunks, AsyncIterable):
        sending = asyncio.get_running_loop().create_task(_send(waiting, chunks))
        _SENDING.add(sending)
        sending.add_done_callback(_SENDING.discard)
    else:
        sending_all = _send(waiting, _each(chunks))
        threading.Thread(target=asyncio.run, args=(sending_all,), name="arriving", daemon=True).start()
    # A sender whose dataset is gone must not wait for ever.
    weakref.finalize(source, _discard, waiting).atexit = False
    with warnings.catch_warnings():
        # No other argument sets the number of retries. A task that is repeated would begin in the middle, and Ray takes
        # the rows of its first attempt and the end of its second for a whole.
        warnings.simplefilter("ignore", DeprecationWarning)
        # One block for now: for one task Ray would split each of its blocks otherwise.
        dataset = ray.data.read_datasource(
            source, **{"override_num_blocks": 1, "ray_remote_args": {"max_retries": 0}, **options}
        )
    dataset.context.target_max_block_size = BLOCK_BYTES
    dataset.context.execution_options.resource_limits = ExecutionResources(object_store_memory=IN_FLIGHT_BYTES)
    return dataset


def _discard(waiting: Any) -> None:
    # The cluster may be another one by now, which Ray reports by a ValueError.
    if ray.is_initialized():
        with contextlib.suppress(RayError, ValueError):
            ray.kill(waiting)


class _Waiting:
    """Bytes between one sender and one reader."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._chunks: deque[bytes] = deque()
        self._held = 0
        self._begun = False
        self._end: str | None = None  # the reason why it broke off, empty for a whole upload
        self._changed = asyncio.Condition()

    async def put(self, chunk: bytes) -> None:
        """Add bytes once there is room."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._held < self._most)
            self._chunks.append(chunk)
            self._held += len(chunk)
            self._changed.notify_all()

    async def end(self, failure: str = "") -> None:
        """No more bytes come."""
        async with self._changed:
            self._end = failure
            self._changed.notify_all()

    async def begin(self) -> None:
        """Claim the bytes for a reader. Raises ReftError for a second one."""
        if self._begun:
            raise ReftError("an upload can be read once, and an earlier pass has read this one; send it again")
        self._begun = True

    async def take(self) -> bytes:
        """All bytes that wait, at least one; none at the end. Raises ReftError where the upload broke off."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._chunks or self._end is not None)
            taken = b"".join(self._chunks)
            self._chunks.clear()
            self._held = 0
            self._changed.notify_all()
            if not taken and self._end:
                raise ReftError(self._end)
            return taken


class _ArrivingSource(Datasource):
    """One read task; the tables that it yields are held back where the pipeline lags."""

    def __init__(self, tables: Callable[[], Iterator[pa.Table]]) -> None:
        super().__init__()
        self._tables = tables

    def estimate_inmemory_data_size(self) -> int | None:
        return None

    def get_read_tasks(self, parallelism: int, *_: Any, **__: Any) -> list[ReadTask]:
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None, input_files=None)
        return [ReadTask(self._tables, metadata, schema=ROWS)]


def _pieces(chunk: bytes) -> Iterator[bytes]:
    return (chunk[start : start + _PIECE_BYTES] for start in range(0, len(chunk), _PIECE_BYTES))


async def _each(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def _send(waiting: Any, chunks: AsyncIterable[bytes]) -> None:
    # Where the actor is gone, the dataset is.
    with contextlib.suppress(RayError):
        try:
            async for chunk in chunks:
                for piece in _pieces(chunk):
                    await waiting.put.remote(piece)
        except RayError:
            raise
        except Exception as error:
            await waiting.end.remote(f"the upload broke off: {error or type(error).__name__}")
        else:
            await waiting.end.remote()


def _tables(waiting: Any, name: str, reader: RowReader) -> Iterator[pa.Table]:
    """The rows of the lines that are complete, as they come."""
    ray.get(waiting.begin.remote())
    read: Callable[[bytes], Any] | None = None
    held, at, line = b"", 0, 1
    yield ROWS.empty_table()  # a block at least
    while True:
        taken = ray.get(waiting.take.remote())
        whole, feed, held = (held + taken).rpartition(b"\n")
        if not taken:
            whole, held = held, b""
        elif len(held) > LONGEST_ROW:
            begun = line + whole.count(b"\n") + len(feed)
            raise UsageError(f"{name}, line {begun}: longer than {LONGEST_ROW:,} bytes")
        if read is None and (head := whole or (held if len(held) > HEAD_BYTES else b"")):
            read = _line_reader(head, reader, name)
            if head.startswith(codecs.BOM_UTF8):
                at = len(codecs.BOM_UTF8)
                whole, held = whole.removeprefix(codecs.BOM_UTF8), held if whole else held[at:]
        if read is not None and whole.strip():
            yield table_of(whole, name, at, line, read, reader.judging)
        at += len(whole) + len(feed)
        line += whole.count(b"\n") + len(feed)
        if not taken:
            return


def _line_reader(data: bytes, reader: RowReader, name: str) -> Callable[[bytes], Any]:
    """As `line_reader`. Raises UsageError for data that is not JSONL."""
    for start, kind in _STORED_FIRST:
        if data.startswith(start):
            raise UsageError(f"{name} is {kind}; only JSONL can be read while it arrives: store it, then use read_rows")
    if what := not_data(data):
        raise UsageError(f"{name} is {what}")
    if json_layout(data) is Json.TEXT:
        raise UsageError(f"{name} is one JSON text; write one row on each line, or store it, then use read_rows")
    if reader.judging:
        return reader.read_line
    return line_reader(data.removeprefix(codecs.BOM_UTF8), reader, name)
