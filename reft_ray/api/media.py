"""Images, audio and files in a request: nothing that is not read is judged, so they are refused by name."""

from __future__ import annotations

from pydantic_core import PydanticCustomError

_KINDS = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "input_audio": "audio",
    "audio": "audio",
    "file": "file",
    "input_file": "file",
    "video_url": "video",
}
CODES = frozenset({f"unsupported_{kind}" for kind in _KINDS.values()})


def refuse_media(content: object, place: str = "") -> None:
    """Raise a validation error with one of CODES for a part of this content that is not text; `place` is its path."""
    for index, part in enumerate(content if isinstance(content, list) else ()):
        kind = _KINDS.get(str(part.get("type"))) if isinstance(part, dict) else None
        if kind is not None:
            name = {"image": "an image", "audio": "audio", "file": "a file", "video": "a video"}[kind]
            # PydanticCustomError formats its template: braces cannot come from the place, which we write.
            raise PydanticCustomError(
                f"unsupported_{kind}",
                f"{place}[{index}] is {name}: only text is supported, and nothing unread is cleared",
            )
