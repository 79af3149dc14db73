"""`build_app`: turns the plain classes into Serve deployments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle

from reft_ray.api.chat_model import ChatError, Target
from reft_ray.core.cascade import Opinion
from reft_ray.core.completion import Piece, RawPrompt, Sampling
from reft_ray.core.conversation import Conversation
from reft_ray.core.errors import UsageError
from reft_ray.guards.reply_guard import PARALLEL
from reft_ray.guards.settings import GuardSettings, load_guard
from reft_ray.openmp import spin_briefly
from reft_ray.serving.args import ChatArgs, DeploymentArgs, ServeArgs
from reft_ray.serving.gateway import Gateway
from reft_ray.serving.handle import moderator_of
from reft_ray.serving.student import StudentReplica
from reft_ray.serving.teacher import TeacherReplica
from reft_ray.serving.trainer import TrainerReplica, trained_bases
from reft_ray.telemetry import logs
from reft_ray.telemetry.metric_types import Labeller
from reft_ray.telemetry.ray_recorder import RayRecorder
from reft_ray.telemetry.tracing import tracer_from_environment

TEACHER = "Teacher"
GATEWAY = "Gateway"
STUDENT = "Student"
GUARD = "Guard"
TRAINER = "Trainer"
RETRY_AFTER_SECONDS = 1.0


class Teacher(TeacherReplica):
    """The teacher with Ray's metrics, logs and traces, which cannot be pickled and are made in the replica."""

    def __init__(self, application: str) -> None:
        logs.configure()
        spin_briefly()
        super().__init__(RayRecorder(Labeller(application=application)), tracer_from_environment())


class GuardReplica:
    """Gives the opinions of one guard, in its own deployment: a local model one call at a time, an endpoint several."""

    def __init__(self, settings: dict[str, Any]) -> None:
        parsed = GuardSettings.of(settings, "cascade.guards")
        self._guard = load_guard(parsed)
        self._threads = ThreadPoolExecutor(1 if parsed.local else PARALLEL, thread_name_prefix="guard")

    async def opinions(self, conversations: Sequence[Conversation], seconds: float) -> list[Opinion] | None:
        """One Opinion per conversation, in order; None if `seconds` passed before the call ended."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                return await loop.run_in_executor(self._threads, self._guard.opinions, conversations)
        except TimeoutError:
            return None


class Trainer:
    """A training worker with Ray's metrics and logs, and handles to the teachers and guards that judge its data."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, name: str, args: dict[str, Any], teachers: DeploymentHandle, guards: list[DeploymentHandle]
    ) -> None:
        logs.configure()
        spin_briefly()
        options = ServeArgs.model_validate(args)
        recorder = RayRecorder(Labeller(application=options.application))
        moderator = moderator_of(teachers, guards, options.cascade, recorder)
        if options.service is None:
            raise UsageError("a trainer needs the section `service:`")
        self._replica = TrainerReplica(name, options.service, moderator, recorder)

    def check_health(self) -> None:
        """Serve replaces the replica if this raises."""
        self._replica.check()


def build_app(args: Mapping[str, Any] | ServeArgs) -> Application:
    """The application for `serve run reft_ray.serving.app:build_app`. Raises UsageError for wrong arguments."""
    options = ServeArgs.of(args, "args")
    if (host := http_host()) is not None:
        options.check_bind(host)
    teachers = serve.deployment(
        name=TEACHER,
        user_config=options.teacher.model_dump(),
        # Each check scores the canaries: often enough to catch a broken replica, too rarely to cost throughput.
        health_check_period_s=10,
        health_check_timeout_s=60,
        graceful_shutdown_timeout_s=30,
        **_size(options.teachers),
    )(Teacher).bind(options.application)
    gateways = serve.deployment(
        name=GATEWAY,
        # Time for open streams.
        graceful_shutdown_timeout_s=60,
        **_size(options.gateways),
    )(serve.ingress()(Gateway))
    guards = _guards(options)
    trainers = _trainers(options, teachers, guards)
    return gateways.bind(teachers, options.model_dump(), _students(options), guards, trainers)


def http_host() -> str | None:
    """The address that this cluster's Serve listens on; None before Serve runs. Serve has no public call for it."""
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    return None if client is None else str(client.http_config.host)


def _trainers(options: ServeArgs, teachers: Application, guards: list[Application]) -> list[Application]:
    """One deployment of one replica per base model that the training API offers."""
    if options.service is None:
        return []
    size = {**_size(options.trainers), "num_replicas": 1}
    return [
        serve.deployment(
            name=f"{TRAINER}-{number}" if number else TRAINER,
            health_check_period_s=10,
            health_check_timeout_s=60,
            graceful_shutdown_timeout_s=30,
            **size,
        )(Trainer).bind(name, options.model_dump(), teachers, guards)
        for number, name in enumerate(trained_bases(options.service))
    ]


def _guards(options: ServeArgs) -> list[Application]:
    """One deployment per guard, in the order in which they are asked."""
    return [
        serve.deployment(
            name=f"{GUARD}-{number}" if number else GUARD,
            health_check_period_s=10,
            health_check_timeout_s=60,
            graceful_shutdown_timeout_s=30,
            **_size(options.guards),
        )(GuardReplica).bind(guard.model_dump())
        for number, guard in enumerate(options.cascade.guards)
    ]


def _students(options: ServeArgs) -> dict[str, Application]:
    """One deployment per URI of the base models without an endpoint."""
    if options.service is None:
        return {}
    uris = dict.fromkeys(base.uri for base in options.service.base_models.values() if base.endpoint is None)
    student = _student_class(options.service.chat)
    return {
        uri: serve.deployment(
            name=f"{STUDENT}-{number}" if number else STUDENT,
            health_check_period_s=10,
            health_check_timeout_s=60,
            # Time for running completions.
            graceful_shutdown_timeout_s=60,
            **_size(options.students),
        )(student).bind(uri, options.service.chat, options.application)
        for number, uri in enumerate(uris)
    }


def _student_class(args: ChatArgs) -> type[StudentReplica]:
    """The student for Serve: errors are yielded as values, and the router learns which adapters are loaded."""

    class Student(StudentReplica):
        def __init__(self, uri: str, args: ChatArgs, application: str) -> None:
            logs.configure()
            spin_briefly()
            super().__init__(uri, args, RayRecorder(Labeller(application=application)))

        async def stream(
            self, target: Target, prompt: Conversation | RawPrompt, sampling: Sampling
        ) -> AsyncIterator[Piece | ChatError]:
            """The pieces of a completion; a ChatError is the last item, because Serve wraps and logs exceptions."""
            registered = target.adapter_uri is None
            try:
                async with aclosing(self.generate(target, prompt, sampling)) as pieces:  # type: ignore[type-var]
                    async for piece in pieces:
                        yield piece
                        if not registered:
                            await self.register_adapter(target.adapter_uri)
                            registered = True
            except ChatError as error:
                yield error

        # Serve's cache does not know which adapters are in use, so it holds their URIs only.
        @serve.multiplexed(max_num_models_per_replica=args.max_adapters)
        async def register_adapter(self, adapter: str) -> str:
            """Serve routes by the adapters registered here."""
            return adapter

        def check_health(self) -> None:
            """Serve replaces the replica if this raises."""
            self.check()

    return Student


def _size(size: DeploymentArgs) -> dict[str, Any]:
    return {
        "num_replicas": size.replicas,
        "ray_actor_options": {"num_cpus": size.cpus, "num_gpus": size.gpus},
        "max_ongoing_requests": size.max_ongoing,
        "max_queued_requests": size.max_queued,
        # Requests are counted by telemetry; a log line per teacher call would be too much.
        "logging_config": {"enable_access_log": False},
        "backpressure_config": {"status_code": 503, "retry_after_s": RETRY_AFTER_SECONDS},
    }
