"""The replica's watch over its scores: have they moved away from those that the teacher was calibrated on?"""

from __future__ import annotations

from collections.abc import Sequence

from reft_ray.core.verdict import Verdict
from reft_ray.telemetry.drift import DriftMonitor, ScoreHistogram
from reft_ray.telemetry.recorder import Recorder
from reft_ray.telemetry.verdict_metrics import unit_score

STREAMS = ("moderation", "screening")


class DriftWatch:
    """One monitor per stream; silent for a teacher without a calibration histogram."""

    def __init__(self, teacher: str, histogram: Sequence[int], recorder: Recorder) -> None:
        self._monitors: dict[str, DriftMonitor] = {}
        if sum(histogram):
            for stream in STREAMS:
                calibration = ScoreHistogram.of_cosines(histogram)
                self._monitors[stream] = DriftMonitor(calibration, recorder, stream=stream, teacher=teacher)

    def add(self, stream: str, verdicts: Sequence[Verdict]) -> None:
        """Take the scores of judged rows; rows without text have none."""
        monitor = self._monitors.get(stream)
        if monitor is not None:
            monitor.add([unit_score(verdict.score) for verdict in verdicts if verdict.windows])

    def close(self) -> None:
        """Forget the gauges of a teacher that no longer answers."""
        for monitor in self._monitors.values():
            monitor.close()
