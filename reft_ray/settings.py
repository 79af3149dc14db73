"""Strict settings, and factories that a setting names as `module:function`."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reft_ray.core.errors import UsageError

Factory = Annotated[str, Field(pattern=r"^[\w.]+:\w+$")]
"""`module:function`; see `load_factory`."""


class Settings(BaseModel):
    """Frozen; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @classmethod
    def of(cls, values: Any, where: str = "") -> Self:
        """Validate. Raises UsageError that names every wrong key, by its path below `where`."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UsageError("; ".join(mistakes(cls, error, where))) from None


def mistakes(model: type[BaseModel], error: ValidationError, where: str = "") -> list[str]:
    """One line per mistake, such as `args.filter.windw: unknown key, did you mean window?`."""
    return [_mistake(model, item, where) for item in error.errors()]


def _mistake(model: type[BaseModel], item: Any, where: str) -> str:
    path = ".".join(filter(None, (where, *map(str, item["loc"]))))
    if item["type"] != "extra_forbidden":
        return f"{path or model.__name__}: {item['msg']}"
    for step in item["loc"][:-1]:
        # A key of a mapping is not a field: the type of the mapping has already led to the model of its values.
        if (field := model.model_fields.get(str(step))) is not None:
            model = model_in(field.annotation) or model
    return f"{path}: unknown key, {hint(str(item['loc'][-1]), model.model_fields)}"


def model_in(annotation: Any) -> type[BaseModel] | None:
    """The model that an annotation is or contains, as in `Mapping[str, Model]` and `Model | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((model for part in get_args(annotation) if (model := model_in(part)) is not None), None)


def hint(name: str, known: Iterable[str]) -> str:
    """`did you mean ...?`, or the known names where none is similar."""
    known = list(known)
    near = nearest(name, known)
    return f"did you mean {near}?" if near else f"known: {', '.join(known)}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most similar, if any is."""
    return next(iter(difflib.get_close_matches(name, list(known), n=1)), None)


def all_known(what: str, names: tuple[str, ...], known: Iterable[str]) -> tuple[str, ...]:
    """Return the names, for a validator. Raises ValueError for one that is not among the known ones."""
    known = list(known)
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"no {what} {unknown[0]!r}; there are {', '.join(known)}")
    return names


def load_factory(path: str) -> Callable[..., Any]:
    """Import the callable that `module:function` names. Raises UsageError where there is none.

    Four parts are chosen by such a string, because `jobs`, `api` and `serving` must not import the packages above them
    and every process makes its own:

    - `steps`: the steps of a job (`jobs.steps.Steps`), called with the operator's `options`;
    - `counter`: the tokens of a training file (`jobs.estimate.Counter`), called with each base model's URI;
    - `trainer`: the worker of the training API (`serving.trainer.Worker`), called with a base model, the `options` of
      the steps, and what it works on;
    - `recorder`: a driver's metrics (`telemetry.recorder.Recorder`), called with the application's label.
    """
    module, _, name = path.partition(":")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"{path}: {error}") from error
    return factory
