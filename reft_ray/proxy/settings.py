"""What the operator of a proxy may set."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from reft_ray.jobs.files import MAX_FILE_BYTES
from reft_ray.settings import Settings


class ProxySettings(Settings):
    """The proxy. Sizes in bytes, times in seconds.

    - `policy` `filter` forwards the kept rows of a training file; `fail` refuses a file with a withheld or invalid row.
      Above `max_reject_ratio` withheld among valid rows a file is refused in any case.
    - `upstream_key` replaces the key of clients, who then need `client_key`, unless they are on this machine. Without
      it the proxy admits the callers that the upstream admits.
    """

    upstream: str = Field(pattern=r"^https?://", description="With /v1.")
    state: str = Field(min_length=1, description="A directory for the evidence of screened files.")
    policy: Literal["filter", "fail"] = "filter"
    max_reject_ratio: float = Field(0.5, ge=0, le=1)
    max_file_bytes: int = Field(MAX_FILE_BYTES, ge=1024)
    max_answer_bytes: int = Field(8 << 20, ge=1024, description="The longest answer that is judged.")
    upstream_seconds: float = Field(600.0, gt=0)
    judging_seconds: float = Field(30.0, gt=0)
    upstream_key: str | None = None
    client_key: str | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.client_key is not None and self.upstream_key is None:
            raise ValueError("a client key needs an upstream key: the upstream does not know the client's")
        return self
