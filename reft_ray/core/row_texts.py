"""What a row says beside the turns that training reads: it is judged as well, for other trainers may read it."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import replace

from reft_ray.core.conversation import Conversation, Message, Part, conversation_from, other_texts

_ANSWERS = frozenset({"completion", "response", "chosen", "rejected"})
_TURN_KEYS = frozenset({"role", "content", "tool_calls", "function_call"})
_MEDIA = frozenset(
    {"image", "images", "image_url", "audio", "audios", "audio_url", "input_audio", "video", "videos", "video_url"}
)


def turns_in_full(messages: Sequence[Mapping[str, object]]) -> Conversation:
    """Validated OpenAI chat messages -> Conversation; the texts under a turn's other keys stand behind its calls."""
    return tuple(
        replace(turn, calls=(*turn.calls, *others)) if (others := tuple(_others(values))) else turn
        for turn, values in zip(conversation_from(messages), messages, strict=True)
    )


def rest_of(row: Mapping[str, object], known: Container[str]) -> Conversation:
    """The texts of a row under keys that are not `known`, as turns that are read and not learned."""
    return tuple(Message(_role(other.name, row), other.text, trained=False) for other in other_texts(row, known))


def is_text_part(part: object) -> bool:
    """Whether a part of a turn's content is text (as one without a type is) and nothing else."""
    return (
        isinstance(part, Mapping)
        and part.get("type", "text") == "text"
        and isinstance(part.get("text"), str)
        and not unseen(part)
    )


def unseen(values: Mapping[str, object]) -> list[str]:
    """The keys of a row, turn or part that hold pictures, sound or films, which nobody here can judge."""
    return [key for key in values if key in _MEDIA and values[key]]


def _others(turn: Mapping[str, object]) -> Iterator[Part]:
    yield from other_texts(turn, _TURN_KEYS)
    if isinstance(content := turn.get("content"), list):
        for part in content:
            yield from other_texts(part, ("text",))


def _role(key: str, row: Mapping[str, object]) -> str:
    # Other texts may be prompts, whose thresholds are the stricter ones.
    return "assistant" if key in _ANSWERS and isinstance(row[key], str) else "tool"
