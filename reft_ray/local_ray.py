"""The one way to a Ray: join the cluster of this process or of RAY_ADDRESS, or start a small one on this machine."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import secrets
import shutil
import signal
import tempfile
import threading
import traceback
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

_logger = logging.getLogger(__name__)
_LOOPBACK: dict[str, Any] = {"_node_ip_address": "127.0.0.1", "object_store_memory": 512 << 20}

TRAINING_SLOTS = 4
"""CPU slots at least of a Ray that trains, also on two cores: Ray Data needs some in addition to the workers'."""


def join_ray() -> bool:
    """Use the Ray of this process, or connect to the cluster in RAY_ADDRESS; False without either.

    Raises PermissionError for a cluster that does not answer this process.
    """
    if not ray.is_initialized():
        if not (address := os.environ.get("RAY_ADDRESS")):
            return False
        try:
            ray.init(log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, AuthenticationError) as error:
            # Ray says in its log only which of the two it was.
            message = "Ray does not answer, or RAY_AUTH_MODE=token and the right RAY_AUTH_TOKEN are not set"
            raise PermissionError(errno.EACCES, message, address) from error
    return True


def start_own_ray(num_cpus: int | None = None, **options: Any) -> None:
    """Start a Ray without a dashboard that ends with this process; `options` are those of `ray.init`.

    Its ports run code for their callers and are open on all interfaces. They answer only to a token of this process
    and those that it starts, unless RAY_AUTH_MODE or a token is set in the environment.

    A Ray that is not up after the 30 seconds that it gives itself is ended and started once more: where its agents take
    more than 15 seconds, as on a busy machine, its raylet ends by itself, which no setting changes
    (ray-project/ray#65983). Raises TimeoutError, which names the raylet's log, if the second does not start either.
    """
    if not any(name in os.environ for name in _AUTH_VARIABLES):
        _make_token()
    quiet = {"log_to_driver": False, "logging_level": logging.WARNING}
    log = _start(num_cpus, quiet | options)
    if log is None:
        return
    _logger.warning("Ray did not start within 30 seconds and is started once more; the log of its raylet: %s", log)
    log = _start(num_cpus, quiet | options)
    if log is not None:
        message = "Ray did not start in two tries; try again when there is less to do on this machine, or see"
        raise TimeoutError(errno.ETIMEDOUT, message, log)


def _start(num_cpus: int | None, options: dict[str, Any]) -> str | None:
    """Start a Ray; where it is late its processes are ended, and the path of its raylet's log is returned."""
    try:
        # Without an address Ray joins whatever `ray start` left on this machine, and refuses `num_cpus`.
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, **options)
    except Exception as error:
        # Ray raises no class of its own for it.
        if "timed out during startup" not in str(error):
            raise
        log = "raylet.out among Ray's logs"
        # `ray.shutdown` knows no node whose start failed and would leave its processes: find it where it was raised.
        for frame, _ in traceback.walk_tb(error.__traceback__):
            node: Any = frame.f_locals.get("self")
            if hasattr(node, "kill_all_processes"):
                node.kill_all_processes(check_alive=False, allow_graceful=True)
                log = f"{node.get_logs_dir_path()}/raylet.out"
        ray.shutdown()
        return log
    return None


_AUTH_VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")


def _make_token() -> None:
    """Write a new token to a file that only this user can read, for Ray to find; it is deleted with this process."""
    folder = Path(tempfile.mkdtemp(prefix="reft-ray-auth-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = folder / "token"
    path.touch(0o600)
    path.write_text(secrets.token_hex(32), encoding="ascii")
    # The mode stays unset: `ray.init` then turns authentication on also where Ray was imported long ago, which reads
    # the mode. Without this file it would leave one in the home directory, which breaks later clusters.
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)


def ensure_ray(num_cpus: int | None = None) -> bool:
    """Join a Ray, or start one that only this machine can reach; True if it was started."""
    if join_ray():
        return False
    start_own_ray(num_cpus, **_LOOPBACK)
    return True


def ensure_training_ray(num_cpus: int | None = None, keep_sigterm: bool = False) -> None:
    """`ensure_ray` with CPU slots for Ray Data in addition to those of training workers, also on two cores.

    With `keep_sigterm` the process keeps its SIGTERM handler, which `ray.init` replaces.
    """
    logging.getLogger("ray").setLevel(logging.WARNING)
    slots = num_cpus or max(TRAINING_SLOTS, os.cpu_count() or 1)
    handler = signal.getsignal(signal.SIGTERM)
    if not ray.is_initialized() and not os.environ.get("RAY_ADDRESS"):
        # Ray warns of more worker processes than cores; concurrent runs start them.
        os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(slots))
    if ensure_ray(slots):
        from ray.data import DataContext

        DataContext.get_current().enable_progress_bars = False
    if keep_sigterm and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)
