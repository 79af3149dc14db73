"""Where a command counts: through Ray on a cluster, into a file for node exporter's textfile collector, or nowhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from reft_ray.telemetry.recorder import Recorder

FILE_VARIABLE = "REFT_METRICS_FILE"


@contextmanager
def recording() -> Iterator[Recorder]:
    """The recorder of this command; a file is written whole when the command ends, whatever its end."""
    from reft_ray.telemetry.recorder import NullRecorder, PrometheusRecorder

    if path := os.environ.get(FILE_VARIABLE):
        recorder = PrometheusRecorder()
        try:
            yield recorder
        finally:
            scratch = Path(path).with_suffix(".tmp")
            scratch.write_bytes(recorder.exposition())
            scratch.replace(path)
    elif os.environ.get("RAY_ADDRESS"):
        from reft_ray.telemetry.shared_recorder import recorder_from_environment

        shared = recorder_from_environment()
        try:
            yield shared
        finally:
            shared.close()
    else:
        yield NullRecorder()
