"""Guards by configuration: the same keys on `reft-ray screen`, for jobs and for the online filter."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Self

import httpx
from pydantic import Field, model_validator

from reft_ray.core.cascade import Combine, Guard, Order
from reft_ray.core.errors import UsageError
from reft_ray.evaluation.endpoint import Endpoint, key_of
from reft_ray.guards.formats import FORMATS, ReplyFormat, safeguard
from reft_ray.guards.moderations import ModerationGuard
from reft_ray.guards.reply_guard import EndpointReplies, Replies, ReplyGuard
from reft_ray.settings import Settings

KEY_VARIABLE = "env:REFT_GUARD_API_KEY"


class GuardFormat(StrEnum):
    """What a guard is, by the format of its output."""

    MODERATIONS = "moderations"
    CLASSIFIER = "classifier"
    GENERATOR = "generator"
    LLAMA_GUARD = "llama-guard"
    QWEN3GUARD = "qwen3guard"
    GRANITE_GUARDIAN = "granite-guardian"
    SHIELDGEMMA = "shieldgemma"
    NEMOTRON = "nemotron-safety-guard"
    WILDGUARD = "wildguard"
    SAFEGUARD = "gpt-oss-safeguard"


class GuardSettings(Settings):
    """One guard.

    - `moderations` is any `/v1/moderations` at `url`; `categories` restricts what counts.
    - `classifier` is a sequence classifier, `generator` a chat model whose likelihoods of `safe` and `unsafe` are
      compared: both by the directory `model`.
    - The others generate their verdict: by the directory `model`, or at `url` (ending in `/v1`) by the name `model`.
      `gpt-oss-safeguard` needs the operator's `policy`, a text or `@FILE`.

    A probability of `threshold` and above is flagged. `name` is the guard's in reports. `key` is `env:NAME`, a variable
    where the guard runs.
    """

    format: GuardFormat
    name: str = Field("", pattern=r"^[\w.:/-]*$", max_length=100)
    model: str | None = None
    url: str | None = Field(None, pattern=r"^https?://")
    threshold: float = Field(0.5, gt=0, le=1)
    harmful_labels: tuple[str, ...] = ()
    categories: tuple[str, ...] = ()
    policy: str | None = None
    key: str | None = Field(None, pattern=r"^env:\w+$")
    characters: int = Field(16_000, ge=500, description="The most text of one question; longer rows take several.")
    seconds: float = Field(60.0, gt=0, description="Timeout of one request.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        match self.format:
            case GuardFormat.MODERATIONS:
                if self.url is None:
                    raise ValueError("a moderations guard needs a url")
            case GuardFormat.CLASSIFIER | GuardFormat.GENERATOR:
                if self.url is not None or not self.model:
                    raise ValueError(f"a {self.format} guard needs the directory of its model, and no url")
            case _:
                if not self.model:
                    raise ValueError(f"a {self.format} guard needs a model: a directory or, with a url, its name there")
        if (self.format is GuardFormat.SAFEGUARD) != (self.policy is not None):
            raise ValueError("a policy belongs to gpt-oss-safeguard, which needs one")
        return self

    @property
    def title(self) -> str:
        """The name in reports."""
        if self.name:
            return self.name
        if self.format is GuardFormat.MODERATIONS:
            return f"moderations:{httpx.URL(self.url or '').host}" + (f"/{self.model}" if self.model else "")
        return f"{self.format}:{Path(self.model or '').name}"

    @property
    def local(self) -> bool:
        """Whether the model is loaded where the guard runs."""
        return self.url is None


class CascadeSettings(Settings):
    """Guards next to the teacher, how their verdicts are combined, and who is asked first."""

    guards: tuple[GuardSettings, ...] = ()
    combine: Combine = Combine.ANY
    order: Order = Order.AFTER

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        names = [guard.title for guard in self.guards]
        if len(set(names)) < len(names):
            raise ValueError(f"two guards are called {max(names, key=names.count)}: give them a name each")
        if self.combine is Combine.GREY_BAND and self.order is Order.BEFORE:
            raise ValueError("grey-band asks the guards about rows that the teacher sends to review: use order after")
        return self


def load_guard(settings: GuardSettings, device: str | None = None) -> Guard:
    """The guard. Raises ReftError for a model that cannot be loaded, UsageError for a key or policy that is missing."""
    title, threshold = settings.title, settings.threshold
    if settings.format is GuardFormat.MODERATIONS:
        return ModerationGuard(title, _endpoint(settings), threshold, settings.categories)
    if settings.format in (GuardFormat.CLASSIFIER, GuardFormat.GENERATOR):
        from reft_ray.hf.guards import ClassifierGuard, GeneratorGuard

        if settings.format is GuardFormat.CLASSIFIER:
            return ClassifierGuard.load(str(settings.model), threshold, settings.harmful_labels, device, title)
        return GeneratorGuard.load(str(settings.model), threshold, device, title)
    return ReplyGuard(title, _replies(settings, device), _form(settings), threshold, settings.characters)


def load_guards(settings: Sequence[GuardSettings], device: str | None = None) -> list[Guard]:
    """The guards, in order."""
    return [load_guard(guard, device) for guard in settings]


def _replies(settings: GuardSettings, device: str | None) -> Replies:
    if not settings.local:
        return EndpointReplies(_endpoint(settings))
    from reft_ray.hf.guards import LocalReplies

    return LocalReplies.load(str(settings.model), device)


def _endpoint(settings: GuardSettings) -> Endpoint:
    url = str(settings.url).rstrip("/").removesuffix("/moderations")
    key = key_of(settings.key, "guard") if settings.key else key_of(KEY_VARIABLE, "guard", needed=False)
    return Endpoint(url, settings.model, key, settings.seconds, attempts=4, called=f"guard {settings.title}")


def _form(settings: GuardSettings) -> ReplyFormat:
    if settings.policy is None:
        return FORMATS[settings.format]
    if not settings.policy.startswith("@"):
        return safeguard(settings.policy)
    try:
        return safeguard(Path(settings.policy[1:]).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the policy of guard {settings.title}, {settings.policy[1:]}: {error}") from None


def guard_from(text: str, threshold: float = 0.5) -> GuardSettings:
    """A guard as a command line names it: a URL, `FORMAT:DIRECTORY`, `FORMAT:URL#MODEL` or `@FILE` of YAML.

    Raises UsageError.
    """
    if text.startswith("@"):
        return _from_file(Path(text[1:]))
    kind, _, target = text.partition(":")
    if kind in ("http", "https"):
        kind, target = GuardFormat.MODERATIONS, text
    if kind not in list(GuardFormat) or not target:
        formats = ", ".join(GuardFormat)
        raise UsageError(
            f"--guard {text}: expected the URL of /v1/moderations, FORMAT:DIRECTORY, FORMAT:URL#MODEL or @FILE.yaml; "
            f"formats are {formats}"
        )
    values: dict[str, object] = {"format": kind, "threshold": threshold}
    if target.startswith(("http://", "https://")):
        url, _, model = target.partition("#")
        values |= {"url": url, "model": model or None}
    else:
        # The process that loads it may run in another directory.
        values["model"] = str(Path(target).resolve()) if Path(target).is_dir() else target
    return GuardSettings.of(values, f"--guard {text}")


def _from_file(path: Path) -> GuardSettings:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--guard @{path}: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"--guard @{path}: expected keys such as format, model and url")
    return GuardSettings.of(values, str(path))
