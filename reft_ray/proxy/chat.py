"""Judge a chat request and its answer on their way to the upstream and back; what cannot be read is not passed on."""

from __future__ import annotations

import json
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from reft_ray.api.chat import DONE, REFUSAL, Usage, event_bytes
from reft_ray.api.context import FilterContext
from reft_ray.api.errors import ApiError, invalid
from reft_ray.api.moderator import ModeratorError
from reft_ray.core.conversation import Conversation, Message
from reft_ray.core.verdict import Decision
from reft_ray.rows.reader import RowReader

_READER = RowReader(judging=True)
_NAMES = frozenset(
    {
        "model", "user", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier",
        "reasoning_effort", "verbosity", "tool_choice", "function_call", "modalities", "stop", "logit_bias",
        "stream_options", "metadata",
    }
)  # fmt: skip
"""Keys of a request whose values choose something; the model does not read them."""
_NO_TEXT = frozenset({"role", "id", "type", "index", "finish_reason", "object", "logprobs", "system_fingerprint"})


def asked(body: dict[str, Any]) -> Conversation:
    """All text of a request. Raises ApiError 400 for what cannot be judged: images, audio, another shape."""
    found = _READER.read({key: value for key, value in body.items() if key not in _NAMES})
    if isinstance(found, list):
        fault = found[0]
        code = "unsupported_image" if "image" in fault.message else "invalid_value"
        raise invalid(f"{fault.path or 'messages'}: {fault.message}.", fault.path or "messages", code)
    return found.judged


def answered(events: Iterable[dict[str, Any]]) -> list[Conversation]:
    """All text of each choice of an answer, from its one document or from its chunks."""
    texts: dict[int, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for event in events:
        if not isinstance(event.get("choices"), list):
            raise _unreadable()
        for choice in event["choices"]:
            if not isinstance(choice, dict):
                raise _unreadable()
            for path, text in _texts(choice, ""):
                texts[choice.get("index", 0)][path].append(text)
    return [
        tuple(Message("assistant", text) for pieces in of.values() if (text := "".join(pieces)).strip())
        for of in texts.values()
    ]


async def flagged(context: FilterContext, rows: Sequence[Conversation], seconds: float) -> bool:
    """Whether the filter withholds one of these; those without text pass. Raises ApiError without a verdict."""
    judged = [row for row in rows if row]
    if not judged:
        return False
    try:
        batch = await context.moderator.judge(judged, None, time.monotonic() + seconds)
    except ModeratorError as error:
        raise context.failure(error) from None
    context.record(batch, "moderation")
    return any(verdict.decision is not Decision.ALLOW for verdict in batch.verdicts)


def blocked(body: dict[str, Any]) -> dict[str, Any]:
    """A completion that says that the filter blocked it, in OpenAI's form."""
    message = {"role": "assistant", "content": None, "refusal": REFUSAL}
    choice = {"index": 0, "message": message, "finish_reason": "content_filter", "logprobs": None}
    return {**_head(body, "chat.completion"), "choices": [choice], "usage": Usage().body()}


def blocked_stream(body: dict[str, Any]) -> bytes:
    """The same as a stream."""
    head = _head(body, "chat.completion.chunk")
    refusal = {"role": "assistant", "refusal": REFUSAL}
    deltas: tuple[tuple[dict[str, str], str | None], ...] = (refusal, None), ({}, "content_filter")
    chunks = [{**head, "choices": [{"index": 0, "delta": delta, "finish_reason": end}]} for delta, end in deltas]
    return b"".join(map(event_bytes, chunks)) + DONE


def events_of(stream: bytes) -> list[dict[str, Any]]:
    """The events of a whole stream. Raises ApiError 502 for one that is not an event of a completion."""
    events = []
    for line in stream.decode("utf-8", "replace").splitlines():
        name, _, data = line.partition(":")
        if name != "data" or data.strip() == "[DONE]":
            if name not in ("", "data", "event", "id", "retry"):
                raise _unreadable()
            continue
        try:
            event = json.loads(data)
        except ValueError:
            raise _unreadable() from None
        if not isinstance(event, dict):
            raise _unreadable()
        if "error" not in event:
            events.append(event)
    return events


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Each text in a choice under the path of its keys; pieces of one text have one path."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            if key not in _NO_TEXT:
                yield from _texts(item, f"{path}.{key}")
    elif isinstance(value, list):
        for place, item in enumerate(value):
            at = item.get("index", place) if isinstance(item, dict) else place
            yield from _texts(item, f"{path}[{at}]")


def _head(body: dict[str, Any], kind: str) -> dict[str, Any]:
    created = int(time.time())
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "object": kind, "created": created, "model": str(body.get("model"))}


def _unreadable() -> ApiError:
    return ApiError(502, "The upstream's answer cannot be read, so it was not judged.", code="upstream_invalid")
