"""Labels and bounds of buckets that several metrics of the catalogue share."""

from __future__ import annotations

from reft_ray.telemetry.metric_types import Label

STREAM = Label("stream", ("moderation", "screening", "dataset", "chat"))
TEACHER = Label("teacher", limit=16)
PROJECT = Label("project", limit=50)
DECISION = Label("decision", ("allow", "review", "block"))
REASON = Label(
    "reason",
    ("clear", "refusal_score", "encoded_text", "guard", "job_threshold", "no_text", "truncated"),
)
POLICY = Label("policy", ("online", "filter", "review", "fail"))
MODEL = Label("model", ("base", "student"))
BOUND = Label("bound", ("estimate", "low", "high"))
STAGE = Label("stage", ("teacher", "student"))
STATUSES = ("validating_files", "screening", "queued", "running", "evaluating", "paused")
ENDED = ("succeeded", "failed", "cancelled")
TRAINING_KIND = Label(
    "kind",
    (
        "create_model",
        "forward",
        "forward_backward",
        "optim_step",
        "load_weights",
        "save_weights",
        "save_weights_for_sampler",
        "save_weights_external",
        "sample",
        "gate",
    ),
)

LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
LONG = (1.0, 5.0, 15.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 43200.0, 86400.0)
POWERS = tuple(float(2**n) for n in range(11))
SCORE_BUCKETS = tuple(round(n / 40, 3) for n in range(1, 41))
