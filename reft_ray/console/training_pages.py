"""Sessions of training loops: for customers their own, for the operator's people all of them.

The pages show counts, reasons and gates, never a datum's text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse

from reft_ray.console.page import Site, route_class
from reft_ray.jobs.training import TrainingStore
from reft_ray.jobs.training_records import TrainingCheckpoint, TrainingModel, TrainingSession

_SEVERITIES = ("low", "medium", "high")


@dataclass(frozen=True, slots=True)
class Account:
    """What a model's loop, or those of a session, have done. `withheld` and `masked` count data by reason."""

    steps: int
    data: int
    withheld: Counter[str]
    masked: Counter[str]
    tokens: int
    withheld_tokens: int
    unjudged_tokens: int
    findings: dict[str, str]

    @classmethod
    def of(cls, models: Iterable[TrainingModel]) -> Account:
        """The sum of models' accounts; of each finding its highest severity."""
        counts: Counter[str] = Counter()
        withheld: Counter[str] = Counter()
        masked: Counter[str] = Counter()
        findings: dict[str, str] = {}
        for model in models:
            account = model.account
            counts.update({name: value for name, value in account.items() if isinstance(value, int)})
            withheld.update(account.get("withheld", {}))
            masked.update(account.get("masked", {}))
            for name, severity in account.get("findings", {}).items():
                findings[name] = max(severity, findings.get(name, severity), key=_SEVERITIES.index)
        return cls(
            steps=counts["steps"],
            data=counts["data"],
            withheld=withheld,
            masked=masked,
            tokens=counts["tokens"],
            withheld_tokens=counts["withheld_tokens"],
            unjudged_tokens=counts["unjudged_tokens"],
            findings=findings,
        )


@dataclass(frozen=True, slots=True)
class ModelView:
    """A model in training with its saved weights."""

    model: TrainingModel
    account: Account
    checkpoints: Sequence[TrainingCheckpoint]


@dataclass(frozen=True, slots=True)
class SessionView:
    """A session with its models."""

    session: TrainingSession
    models: Sequence[ModelView]

    @property
    def account(self) -> Account:
        """What all its models have done."""
        return Account.of(view.model for view in self.models)

    @property
    def state(self) -> str:
        """Whether it may send requests."""
        return "active" if self.session.finished_at is None else "ended"

    @property
    def last_activity(self) -> float:
        """The time of its last request or heartbeat."""
        return max(self.session.seen_at, *(view.model.used_at for view in self.models), 0.0)

    @property
    def gates(self) -> Counter[str]:
        """Its saved samplers and downloads by the release gate's result."""
        found = [saved.gate for view in self.models for saved in view.checkpoints if saved.kind != "weights"]
        return Counter(found)


def views_of(store: TrainingStore, sessions: Sequence[TrainingSession]) -> list[SessionView]:
    """Sessions with their models and saved weights, in two queries."""
    ids = [session.id for session in sessions]
    models: dict[str, list[ModelView]] = {}
    saved: dict[str, list[TrainingCheckpoint]] = {}
    for checkpoint in store.checkpoints_in(ids):
        saved.setdefault(checkpoint.model_id, []).append(checkpoint)
    for model in store.models_in(ids):
        view = ModelView(model, Account.of([model]), saved.get(model.id, ()))
        models.setdefault(model.session_id, []).append(view)
    return [SessionView(session, models.get(session.id, ())) for session in sessions]


SHOWN_EVENTS = 100


def router(site: Site, store: TrainingStore) -> APIRouter:
    """The routes of training sessions."""
    routes = APIRouter(route_class=route_class(site))
    sessions = site.sessions

    @routes.get("/training")
    def list_sessions(request: Request, after: Annotated[str, Query(max_length=64)] = "") -> HTMLResponse:
        session = sessions.required(request)
        found, has_more = store.recent(session.principal.visible, after or None)
        views = views_of(store, found)
        return site.page("training", session, title="Training sessions", views=views, has_more=has_more)

    @routes.get("/training/{session_id}")
    def session_page(request: Request, session_id: str) -> HTMLResponse:
        session = sessions.required(request)
        (view,) = views_of(store, [store.session(session_id, session.principal.visible)])
        events = store.latest_events([each.model.id for each in view.models], SHOWN_EVENTS)
        return site.page("training_session", session, title="Training session", view=view, events=events)

    return routes
