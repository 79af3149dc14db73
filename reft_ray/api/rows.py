"""One line of JSONL -> a conversation, or the reason why it is none."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from reft_ray.core.conversation import ROLES, Conversation, chat, parts, readable, row_id, tool_definitions
from reft_ray.core.row_texts import is_text_part, rest_of, turns_in_full, unseen

_SHAPES = "a row is {'messages': [...]}, {'prompt': ..., 'completion': ...} or {'text': ...}"


class RowError(ValueError):
    """The row cannot be judged. `code` is one of OpenAI's validator names where it has one."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a dataset: `number` counts lines from 0; `conversation` is None when `error` says why."""

    number: int
    size: int
    id: str | None = None
    conversation: Conversation | None = None
    error: RowError | None = None


def parse_row(number: int, line: bytes) -> Row:
    """The row on a line; a bad one carries its error. The line's text is repeated in no error."""
    try:
        conversation = _conversation(_json(line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line))
    except RowError as error:
        return Row(number, len(line), error=error)
    cleaned = tuple(
        turn if turn.content.isascii() else replace(turn, content=readable(turn.content)) for turn in conversation
    )
    return Row(number, len(line), row_id(conversation), cleaned)


async def lines(chunks: AsyncIterator[bytes], max_bytes: int) -> AsyncIterator[bytes | None]:
    """Lines without their ends, in order; None in the place of a line longer than `max_bytes`, which is not kept."""
    held = bytearray()
    overlong = False
    async for chunk in chunks:
        start = 0
        while (end := chunk.find(b"\n", start)) >= 0:
            overlong = overlong or len(held) + end - start > max_bytes
            yield None if overlong else bytes(held) + chunk[start:end]
            held.clear()
            overlong = False
            start = end + 1
        overlong = overlong or len(held) + len(chunk) - start > max_bytes
        if overlong:
            held.clear()
        else:
            held += chunk[start:]
    if overlong:
        yield None
    elif held:
        yield bytes(held)


def overlong_row(number: int, max_bytes: int) -> Row:
    """The row for a line that was too long to keep."""
    return Row(number, max_bytes, error=RowError("row_too_long", f"the row has more than {max_bytes:,} bytes"))


def _json(line: bytes) -> Any:
    if not line.strip():
        raise RowError("empty_line", "the line is empty")
    try:
        return json.loads(line.decode(), object_pairs_hook=_unique)
    except RowError:
        raise
    except UnicodeDecodeError as error:
        raise RowError("invalid_utf8", f"byte {error.start} is not UTF-8") from None
    except json.JSONDecodeError as error:
        raise RowError("invalid_json", f"not JSON at character {error.pos}: {error.msg}") from None
    except (RecursionError, ValueError):
        raise RowError("invalid_json", "nested too deeply, or a number with too many digits") from None


def _unique(entries: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(entries)
    if len(values) < len(entries):
        # We would judge the last value, and other readers take the first.
        raise RowError("ambiguous_keys", "a JSON object has one key twice")
    return values


def _conversation(value: Any) -> Conversation:
    if not isinstance(value, dict):
        raise RowError("data_type", f"not a JSON object: {_SHAPES}")
    _check_seen("", value)
    turns: Conversation
    if "messages" in value:
        turns, known = (*_messages(value["messages"]), *tool_definitions(value)), {"messages", "tools", "functions"}
    elif "prompt" in value:
        answer = "completion" if "completion" in value else "response"
        response = value.get(answer)
        if response is not None and not isinstance(response, str):
            raise RowError("data_type", f"{answer} must be a string")
        turns, known = chat(_string(value["prompt"], "prompt"), response), {"prompt", answer}
    elif "text" in value:
        turns, known = chat(_string(value["text"], "text")), {"text"}
    else:
        raise RowError("missing_messages_list", f"no messages: {_SHAPES}")
    # Whoever trains on the row may read other keys than we do: what was not judged is not cleared.
    return (*turns, *rest_of(value, known))


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise RowError("data_type", f"{name} must be a string")
    if not value.strip():
        raise RowError("missing_content", f"{name} is empty")
    return value


def _messages(value: Any) -> Conversation:
    if not isinstance(value, list) or not value:
        raise RowError("missing_messages_list", "messages must be a list with at least one message")
    for index, turn in enumerate(value):
        _check_turn(f"messages[{index}]", turn)
    conversation = turns_in_full(value)
    if not parts(conversation):
        raise RowError("missing_content", "no message has any text")
    return conversation


def _check_seen(name: str, values: Mapping[str, Any]) -> None:
    if media := unseen(values):
        raise RowError("unsupported_content", f"{name}{media[0]} cannot be judged; what cannot be read is not cleared")


def _check_turn(name: str, turn: Any) -> None:
    if not isinstance(turn, Mapping) or "role" not in turn:
        raise RowError("message_missing_key", f"{name} must be an object with role and content")
    if turn["role"] not in ROLES:
        raise RowError("unrecognized_role", f"{name}.role must be one of {', '.join(ROLES)}")
    _check_seen(f"{name}.", turn)
    content = turn.get("content")
    if content is None:
        # OpenAI leaves the content out where the assistant calls tools.
        if not turn.get("tool_calls") and not turn.get("function_call"):
            raise RowError("missing_content", f"{name}.content is missing")
    elif not isinstance(content, str):
        _check_parts(name, content)


def _check_parts(name: str, content: Any) -> None:
    if not isinstance(content, Sequence):
        raise RowError("data_type", f"{name}.content must be a string or a list of parts")
    for index, part in enumerate(content):
        if not is_text_part(part):
            raise RowError(
                "data_type", f"{name}.content[{index}] is not a text part; what cannot be read is not cleared"
            )
