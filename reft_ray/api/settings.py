"""The operator's limits on the online filter."""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """Lowest and highest value that a request may ask for as a threshold."""

    lowest: float
    highest: float

    def __post_init__(self) -> None:
        if not -1.0 <= self.lowest <= self.highest <= 1.0:
            raise ValueError(f"bounds need -1 <= lowest <= highest <= 1, got {self.lowest} and {self.highest}")


@dataclass(frozen=True, slots=True)
class FilterSettings:
    """Sizes in bytes, times in seconds.

    `max_screenings` are those of one project.
    Without bounds a request may make the filter stricter than the teacher's thresholds, never laxer.
    """

    review_bounds: Bounds | None = None
    block_bounds: Bounds | None = None
    moderation_seconds: float = 10.0
    max_inputs: int = 256
    max_body_bytes: int = 4 * MIB
    max_upload_bytes: int = 64 * MIB
    max_row_bytes: int = MIB
    max_chunk_bytes: int = MIB
    max_streams: int = 8
    batch_rows: int = 512
    batch_bytes: int = 256 * 1024
    window: int = 4
    idle_seconds: float = 60.0
    stall_seconds: float = 120.0
    max_screenings: int = 256
    max_screenings_in_all: int = 4096
    max_chunks: int = 16_384
    screening_seconds: float = 86_400.0
