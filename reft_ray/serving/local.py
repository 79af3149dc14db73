"""Run Ray, Serve and the application on this machine for the duration of a `with` block."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray.exceptions import RayError

from reft_ray.core.errors import ReftError, UsageError
from reft_ray.local_ray import start_own_ray
from reft_ray.serving.app import build_app
from reft_ray.serving.args import ServeArgs
from reft_ray.serving.trainer import trained_bases

LOOPBACK = "127.0.0.1"
APPLICATION = "reft"


@contextmanager
def local_service(
    args: ServeArgs, port: int = 8000, quiet: bool = True, metrics_port: int | None = None
) -> Iterator[str]:
    """Start Ray and Serve on loopback, yield the service's URL once it is ready, and stop them afterwards.

    Ray exposes the metrics of all its processes at `metrics_port`, by default a free port.
    Raises UsageError when a port is in use, ReftError when the service does not start.
    """
    for wanted in filter(None, (port, metrics_port)):
        _check_free(wanted)
    # Serve kills a proxy that is not ready in time and gives up; its default of 5 s is too short on a busy machine.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    start_own_ray(
        _logical_cpus(args),
        log_to_driver=not quiet,
        logging_level=logging.ERROR if quiet else logging.INFO,
        _metrics_export_port=metrics_port,
    )
    if quiet:
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
    try:
        try:
            serve.start(
                http_options={"host": LOOPBACK, "port": port},
                logging_config={"enable_access_log": False, "log_level": "WARNING" if quiet else "INFO"},
            )
        except (RayError, TimeoutError) as error:
            raise ReftError(f"Serve did not start: {type(error).__name__}; see the logs with --logs") from error
        try:
            serve.run(build_app(args), name=APPLICATION, route_prefix="/")
        except RuntimeError as error:
            raise ReftError(f"the service did not start: {_cause()} ({error})") from None
        yield f"http://{LOOPBACK}:{port}"
        serve.shutdown()
    finally:
        ray.shutdown()


_CPUS_OF_A_JOB = 4
"""Training workers and Ray Data tasks."""


def _logical_cpus(args: ServeArgs) -> int:
    """At least the CPUs that deployments and jobs request: on one machine they share the physical ones."""
    sizes, jobs = [args.teachers, args.gateways, *[args.guards] * len(args.cascade.guards)], 0
    if args.service is not None:
        sizes += [args.students] * len({base.uri for base in args.service.base_models.values()})
        sizes += [args.trainers] * len(trained_bases(args.service))
        jobs = args.service.slots.training
    wanted = sum(size.replicas * size.cpus for size in sizes) + jobs * _CPUS_OF_A_JOB
    return max(os.cpu_count() or 1, int(wanted) + 1)


def _check_free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise UsageError(f"port {port} cannot be used ({error.strerror}): choose another") from None


def _cause() -> str:
    """The last line of Serve's message about the deployment that failed."""
    application = serve.status().applications.get(APPLICATION)
    messages = [item.message for item in application.deployments.values() if item.message] if application else []
    lines = [line.strip() for message in messages for line in message.splitlines() if line.strip()]
    return lines[-1] if lines else "see the Serve logs"
