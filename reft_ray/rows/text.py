"""From messages in JSON to the text that training reads, and to all text that the filter judges, and back.

Training reads the `content` of each turn. The filter also judges tool calls, tool definitions and the texts under
other keys: a trainer that reads those keys would learn them.
"""

from __future__ import annotations

import json
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

import orjson

from reft_ray.core.conversation import Conversation, Message, Part
from reft_ray.core.errors import ReftError

_CALL_KEYS = ("", "function", "custom", "name", "arguments", "input")
_KEY_CHARACTERS = 40
"""Maximum length of a key in the name of a part: clients choose keys, of any length."""
_IDENTIFIER_CHARACTERS = 64
_ANSWERS = frozenset({"completion", "response", "chosen", "rejected"})
_PLAIN_KEYS = frozenset({"role", "content"})
_TURN_KEYS = frozenset({"role", "content", "tool_calls", "function_call"})
_EXTRA = ("tool_calls", "function_call", "tool_call_id", "name", "refusal", "reasoning_content", "tools", "rejected")
"""What a chat template may read of a turn besides its content."""
_MEDIA = frozenset(
    {"image", "images", "image_url", "audio", "audios", "audio_url", "input_audio", "video", "videos", "video_url"}
)
_RESERVED = frozenset({"role", "content", "weight", "tool_calls", "id", "type", "index", "tool_call_id"})
"""Keys of a message under which a text would not be read back as text."""


def conversation_from(messages: Sequence[Mapping[str, object]]) -> Conversation:
    """Validated OpenAI chat messages as training reads them; text parts of a content are joined by newlines."""
    return tuple(map(_turn, messages))


def _turn(turn: Mapping[str, object]) -> Message:
    role, text = str(turn["role"]), readable(_content(turn.get("content")))
    if turn.keys() == _PLAIN_KEYS:
        return Message(role, text)
    return Message(role, text, turn.get("weight", 1) != 0, _calls(turn), _extra(turn))


def with_tools(conversation: Conversation, row: Mapping[str, object]) -> Conversation:
    """The conversation with the tool definitions of its row (`tools`, `functions`), for the chat template."""
    tools = row.get("tools") or row.get("functions")
    if not tools or not conversation:
        return conversation
    first, *others = conversation
    extra = _json(first.values | {"tools": tools}) or _json({"tools": "nested too deeply"})
    return (replace(first, extra=extra), *others)


def with_rejected(chosen: Conversation, rejected: Conversation) -> Conversation:
    """The dialogue of a preference pair with the whole dialogue of its other answer, for training on pairs."""
    if not chosen or not rejected:
        return chosen
    *others, last = chosen
    kept = last.values | {"rejected": [_message(turn) for turn in rejected]}
    return (*others, replace(last, extra=_json(kept)))


def full_conversation(messages: Sequence[Mapping[str, object]]) -> Conversation:
    """Validated OpenAI chat messages with all their texts: those under other keys of a turn follow its tool calls.

    So does a content in the other spellings that trainers and templates give it: parts without a separator (`joined`),
    and the text in JSON without its escapes (`unescaped`).
    """
    return tuple(
        replace(turn, calls=(*turn.calls, *others)) if (others := tuple(_turn_texts(values))) else turn
        for turn, values in zip(conversation_from(messages), messages, strict=True)
    )


def messages_json(conversation: Conversation) -> str:
    """A conversation as OpenAI messages in JSON; `full_conversation` reads it back."""
    return orjson.dumps([_message(turn) for turn in conversation]).decode()


def read_messages(text: str) -> Conversation:
    """The conversation of `messages_json`, as training reads it. Raises ReftError for anything but a list."""
    found = orjson.loads(text)
    if not isinstance(found, list):
        raise ReftError("a kept row must be a list of messages")
    return conversation_from(found)


def tool_definitions(row: Mapping[str, object]) -> Conversation:
    """The tool definitions of a row (`tools`, `functions`) as one turn that is not trained on, or nothing."""
    text = "\n".join(_leaves([row.get("tools"), row.get("functions")]))
    return (Message("tool", text, trained=False),) if text.strip() else ()


def other_turns(row: Mapping[str, object], known: Container[str]) -> Conversation:
    """The texts of a row under keys that are not `known`, as turns that are not trained on."""
    return tuple(Message(_role(other.name, row), other.text, trained=False) for other in other_texts(row, known))


def other_texts(values: Mapping[str, object], known: Container[str]) -> Iterator[Part]:
    """Each text of a row or turn under a key that is not `known`, named after its key; without numbers and ids."""
    for key, value in values.items():
        if key in known or not isinstance(value, str | list | Mapping):
            continue
        if isinstance(value, str):
            text = "" if _is_identifier(key, value) else readable(value)
        else:
            text = "\n".join(_leaves(value, numbers=False))
        if text.strip():
            yield Part(readable(key[:_KEY_CHARACTERS]), text)


def is_text_part(part: object) -> bool:
    """Whether a part of a turn's content is text (a part without a type is text) and nothing else."""
    return (
        isinstance(part, Mapping)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
        and not media_keys(part)
    )


def media_keys(values: Mapping[str, object]) -> list[str]:
    """The keys of a row, turn or part that hold images, audio or video, which the filter cannot judge."""
    return [key for key in values if key in _MEDIA and values[key]]


def readable(text: str) -> str:
    """The text with lone surrogates replaced: JSON can carry them, and no tokenizer reads them."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


def _content(content: object) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "\n".join(str(part.get("text", "")) for part in content if isinstance(part, Mapping))
    return str(content)


def _calls(turn: Mapping[str, object]) -> tuple[Part, ...]:
    """The text of each tool call of a turn; values of another shape than OpenAI's are read as well."""
    called = turn.get("tool_calls")
    listed = called if isinstance(called, list) else [called]
    named = [(f"tool_calls[{index}]", call) for index, call in enumerate(listed)]
    named.append(("function_call", turn.get("function_call")))
    return tuple(Part(name, text) for name, call in named if call and (text := "\n".join(_leaves(call))).strip())


def _extra(turn: Mapping[str, object]) -> str:
    found = {key: turn[key] for key in _EXTRA if turn.get(key)}
    return _json(found) if found else ""


def _json(values: Mapping[str, object]) -> str:
    """The values as JSON; empty where they are nested too deeply to write.

    `rows.checks` refuses such rows for training, and judging reads the texts of their calls.
    """
    try:
        return readable(json.dumps(values, ensure_ascii=False, default=str))
    except (RecursionError, ValueError):
        return ""


def _turn_texts(turn: Mapping[str, object]) -> Iterator[Part]:
    if turn.keys() != _PLAIN_KEYS:
        yield from other_texts(turn, _TURN_KEYS)
    content = turn.get("content")
    if isinstance(content, list):
        texts = [str(part.get("text", "")) for part in content]
        if len(texts) > 1 and "joined" not in turn and (joined := readable("".join(texts))).strip():
            yield Part("joined", joined)
        for part in content:
            yield from other_texts(part, ("text",))
    elif (
        isinstance(content, str) and "\\" in content and content.lstrip()[:1] in ("{", "[") and "unescaped" not in turn
    ):
        text = "\n".join(_leaves(content))
        if text != content:
            yield Part("unescaped", text)


def _role(key: str, row: Mapping[str, object]) -> str:
    # Other texts may be prompts, which have the stricter thresholds.
    return "assistant" if key in _ANSWERS and isinstance(row[key], str) else "tool"


def _is_identifier(name: object, value: object) -> bool:
    """Whether an entry of a row, turn or call only identifies it: a short ASCII word or a number.

    A longer word may be a sentence without spaces, and some scripts have no spaces.
    """
    if name not in ("id", "type", "index", "tool_call_id") or not isinstance(value, str | int | float | None):
        return False
    text = str(value)
    return len(text) <= _IDENTIFIER_CHARACTERS and text.isascii() and not any(map(str.isspace, text))


class _Entries(list[tuple[str, object]]):
    """The entries of a JSON object, in order; a dictionary would keep only the last value of a repeated key."""


def _leaves(call: object, numbers: bool = True) -> Iterator[str]:
    """The texts of a tool call or tool definition, one `key: text` line each, with or without numbers.

    Arguments are JSON within JSON, whose escapes would hide words from a tokenizer, so they are parsed. Iterative:
    nesting by a client must not exhaust the stack.
    """
    pending: list[tuple[str, object]] = [("", call)]
    while pending:
        key, value = pending.pop()
        if isinstance(value, str) and value.lstrip().startswith(("{", "[")):
            with suppress(ValueError, RecursionError):
                value = json.loads(value, object_pairs_hook=_Entries)
        if isinstance(value, Mapping | _Entries) and value:
            entries = value.items() if isinstance(value, Mapping) else value
            pending += reversed([(str(name), inner) for name, inner in entries if not _is_identifier(name, inner)])
        elif isinstance(value, list) and value:
            pending += [(key, inner) for inner in reversed(value)]
        elif not numbers and isinstance(value, int | float):
            continue
        elif value not in (None, "", {}, []):
            yield readable(f"{key}: {value}" if key else str(value))
        elif key not in _CALL_KEYS:
            # The name of an argument without a value is text, too.
            yield readable(key)


def _message(turn: Message) -> dict[str, object]:
    values: dict[str, object] = {"role": turn.role, "content": turn.content}
    if not turn.trained:
        values["weight"] = 0
    values |= turn.values
    unnamed = []
    for call in turn.calls:
        if call.name.partition("[")[0] in turn.values:
            continue  # its text is read from there
        if call.name.startswith("tool_calls[") or call.name in values or call.name in _RESERVED:
            unnamed.append(call.text)
        else:
            values[call.name] = call.text
    return values | {"tool_calls": unnamed} if unnamed else values
