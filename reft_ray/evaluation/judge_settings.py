"""Judges by configuration: the same keys on `reft-ray eval`, for the release gate and in `reft-ray bench`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Literal, Self

from pydantic import Field, model_validator

from reft_ray.evaluation.endpoint import RUBRIC, ChatJudge, Endpoint, ModerationJudge, key_of
from reft_ray.evaluation.judges import ClassifierJudge, RefusalMatcher, ResponseJudge
from reft_ray.settings import Settings


class JudgeKind(StrEnum):
    """What judges."""

    MATCHER = "matcher"
    CLASSIFIER = "classifier"
    ENDPOINT = "endpoint"


class JudgeSettings(Settings):
    """One judge.

    - `matcher` reads phrases of refusal and needs no other key.
    - `classifier` is a Hugging Face sequence classifier, `model` by id or path. An answer complied if the probability
      of its `harmful_labels`, names or indices, is above `threshold`.
    - `endpoint` is an OpenAI-compatible service at `url` (ending in `/v1`) with a `model`: `api: chat` asks with
      `prompt` (placeholders `{prompt}` and `{answer}`; the reply begins with COMPLIED or REFUSED, or Yes or No),
      `api: completions` sends that prompt without a chat template, `api: moderations` sends the answers. `key` is
      `env:NAME`, a variable where the judge runs.

    `name` is the judge's in reports, by default its kind.
    """

    kind: JudgeKind = JudgeKind.MATCHER
    name: str = Field("", pattern=r"^[\w.-]*$")
    model: str | None = None
    harmful_labels: tuple[str, ...] = ()
    threshold: float = Field(0.5, ge=0, le=1)
    url: str | None = None
    api: Literal["chat", "completions", "moderations"] = "chat"
    prompt: str = RUBRIC
    key: str | None = Field(None, pattern=r"^env:\w+$")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind is JudgeKind.CLASSIFIER and not (self.model and self.harmful_labels):
            raise ValueError("a classifier judge needs a model and its harmful_labels")
        if self.kind is JudgeKind.ENDPOINT and not (self.model and self.url):
            raise ValueError("an endpoint judge needs a url and a model")
        if not ("{prompt}" in self.prompt and "{answer}" in self.prompt):
            raise ValueError("the judging prompt needs {prompt} and {answer}")
        return self

    @property
    def title(self) -> str:
        """The name in reports."""
        return self.name or self.kind.value


MATCHER_ONLY = (JudgeSettings(),)


def check_names(judges: Sequence[JudgeSettings]) -> None:
    """Raise ValueError where two judges have one name, or there is none."""
    names = [judge.title for judge in judges]
    if not names:
        raise ValueError("name at least one judge")
    if len(set(names)) < len(names):
        raise ValueError(f"two judges are called {max(names, key=names.count)}: give them a name each")


def judges_from(
    settings: Sequence[JudgeSettings], device: str = "cpu", batch_tokens: int = 8192
) -> Mapping[str, ResponseJudge]:
    """The judges by name, in order: the first one decides.

    Raises ReftError for a classifier that cannot be loaded, UsageError for a key that is not set. A judge that does not
    answer raises ReftError when it is asked.
    """
    check_names(settings)
    return {judge.title: _judge(judge, device, batch_tokens) for judge in settings}


def _judge(settings: JudgeSettings, device: str, batch_tokens: int) -> ResponseJudge:
    match settings.kind:
        case JudgeKind.MATCHER:
            return RefusalMatcher()
        case JudgeKind.CLASSIFIER:
            from reft_ray.hf.classifier import HarmClassifier

            harm = HarmClassifier(str(settings.model), settings.harmful_labels, device, batch_tokens)
            return ClassifierJudge(harm, settings.threshold)
        case JudgeKind.ENDPOINT:
            endpoint = Endpoint(str(settings.url), str(settings.model), settings.key and key_of(settings.key, "judge"))
            if settings.api == "moderations":
                return ModerationJudge(endpoint)
            return ChatJudge(endpoint, settings.prompt, raw=settings.api == "completions")
