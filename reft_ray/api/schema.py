"""Requests and responses of the filter's routes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

_MEDIA = {
    "image_url": "image",
    "input_image": "image",
    "image": "image",
    "input_audio": "audio",
    "audio": "audio",
    "file": "file",
    "input_file": "file",
    "video_url": "video",
}
MEDIA_CODES = frozenset({f"unsupported_{kind}" for kind in _MEDIA.values()})


def refuse_media(content: object, place: str = "") -> None:
    """Refuse what is not read, and so not judged, by its name.

    Raises a validation error with one of MEDIA_CODES for a part of this content that is not text; `place` is its path.
    """
    for index, part in enumerate(content if isinstance(content, list) else ()):
        kind = _MEDIA.get(str(part.get("type"))) if isinstance(part, dict) else None
        if kind is not None:
            name = {"image": "an image", "audio": "audio", "file": "a file", "video": "a video"}[kind]
            # PydanticCustomError formats its template: braces cannot come from the place, which we write.
            raise PydanticCustomError(
                f"unsupported_{kind}",
                f"{place}[{index}] is {name}: only text is supported, and nothing unread is cleared",
            )


Threshold = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]

HARMFUL = "harmful"
"""Our own category: what the Ref-Teacher refuses."""


class TextPart(BaseModel):
    """A text part of an input."""

    type: Literal["text"]
    text: str


class Overrides(BaseModel):
    """Thresholds of this request within the operator's bounds; by default only stricter ones are allowed."""

    model_config = ConfigDict(extra="forbid")

    review: Threshold | None = None
    block: Threshold | None = None


class ModerationRequest(BaseModel):
    """OpenAI's moderation request; `reft` is our extension (`extra_body`)."""

    model_config = ConfigDict(extra="forbid")

    input: str | list[str] | list[TextPart] = Field(
        description="A text, a list of texts (one result each), or the text parts of one input (one result)."
    )
    model: str = Field(default="omni-moderation-latest", max_length=256)
    reft: Overrides | None = None

    @field_validator("input", mode="before")
    @classmethod
    def _shape(cls, value: Any) -> Any:
        """Give one message instead of one per member of the union. Raises ValueError."""
        items = value if isinstance(value, list) else [value]
        if not items:
            raise ValueError("is an empty list: there is nothing to judge")
        if not isinstance(value, list | str):
            raise ValueError("must be a string, a list of strings or a list of content parts")
        refuse_media(items)
        for index, item in enumerate(items):
            text = item.get("text") if isinstance(item, dict) and item.get("type") == "text" else item
            if not isinstance(text, str):
                raise ValueError(f"[{index}] must be a string or {{'type': 'text', 'text': string}}")
            if not text.strip():
                raise ValueError(f"[{index}] is empty: there is nothing to judge")
            if isinstance(item, dict) != isinstance(items[0], dict):
                raise ValueError("mixes strings and content parts")
        return value

    def texts(self) -> list[list[str]]:
        """The texts of each result."""
        if isinstance(self.input, str):
            return [[self.input]]
        parts = [part.text for part in self.input if isinstance(part, TextPart)]
        return [parts] if parts else [[text] for text in self.input if isinstance(text, str)]


class ReftResult(BaseModel):
    """The evidence of a result. `score` and `similarity` are the cosine with the refusal feature."""

    score: float | None
    similarity: float | None
    probability: float
    threshold: float
    decision: Literal["allow", "review", "block"]
    part: str
    encoding: str | None
    teacher: str
    truncated: bool
    windows: int
    span: tuple[int, int] | None
    categories: tuple[str, ...]
    hazards: tuple[str, ...]
    decided_by: str | None
    guard_score: float | None
    policy: str


class ModerationResult(BaseModel):
    """`flagged` unless the decision is allow. OpenAI's 13 categories are present; guards judge them, the teacher judges
    `harmful`."""

    flagged: bool
    categories: dict[str, bool]
    category_scores: dict[str, float]
    category_applied_input_types: dict[str, list[Literal["text", "image"]]]
    reft: ReftResult


class Moderation(BaseModel):
    """OpenAI's moderation response."""

    id: str
    model: str
    results: list[ModerationResult]


class Teacher(BaseModel):
    """The current teacher."""

    id: str
    object: Literal["teacher"] = "teacher"
    thresholds: dict[str, float]
    calibration: dict[str, float]
    details: dict[str, Any]


class ScreeningCreate(BaseModel):
    """The body that opens a resumable screening."""

    model_config = ConfigDict(extra="forbid")

    reft: Overrides | None = None
    metadata: dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]] = Field(
        default_factory=dict, max_length=16
    )


class ScreeningClose(BaseModel):
    """The body that closes a screening after `chunks` chunks."""

    model_config = ConfigDict(extra="forbid")

    chunks: Annotated[int, Field(ge=0)]


class Counts(BaseModel):
    """Rows by outcome; they add up to the number of rows."""

    allow: int = 0
    review: int = 0
    block: int = 0
    invalid: int = 0


class Screening(BaseModel):
    """A resumable screening. `next_chunk` is the first sequence number without verdicts."""

    id: str
    object: Literal["screening"] = "screening"
    status: Literal["open", "closed"]
    created_at: int
    expires_at: int
    chunks: int
    next_chunk: int
    rows: int
    bytes: int
    counts: Counts
    thresholds: dict[str, float] | None
    metadata: dict[str, str]


class ChunkReceipt(BaseModel):
    """Confirms that a chunk's verdicts are stored; sending the same bytes again returns the same receipt."""

    object: Literal["screening.chunk"] = "screening.chunk"
    sequence: int
    rows: int
    counts: Counts
    sha256: str
    duplicate: bool
