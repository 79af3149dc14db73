"""The metric catalogue: the only file that contains metric names.

Conventions: base units, counters end in `_total`, labels are bounded, and no label contains row text or the id of a
row, job or user. Cosines are recorded as (1 + cos) / 2, because Ray histograms need positive bucket bounds. Recorders
add the label `application` to every metric.
"""

from __future__ import annotations

from reft_ray.telemetry.metric_types import Kind, Label, Metric, Unit

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

_LATENCY = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_LONG = (1.0, 5.0, 15.0, 60.0, 300.0, 600.0, 1800.0, 3600.0, 14400.0, 43200.0, 86400.0)
_POWERS = tuple(float(2**n) for n in range(11))
SCORE_BUCKETS = tuple(round(n / 40, 3) for n in range(1, 41))


def _counter(name: str, unit: Unit, help: str, *labels: Label) -> Metric:
    return Metric(name, Kind.COUNTER, unit, help, labels)


def _gauge(name: str, unit: Unit, help: str, *labels: Label) -> Metric:
    return Metric(name, Kind.GAUGE, unit, help, labels)


def _histogram(name: str, unit: Unit, help: str, buckets: tuple[float, ...], *labels: Label) -> Metric:
    return Metric(name, Kind.HISTOGRAM, unit, help, labels, buckets)


# The training API

_TRAINING_KIND = Label(
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
TRAINING_REQUESTS = _counter(
    "reft_training_requests_total",
    Unit.REQUESTS,
    "Requests of training loops that ended, by kind and status.",
    _TRAINING_KIND,
    Label("status", ("done", "failed")),
)
TRAINING_REQUEST_SECONDS = _histogram(
    "reft_training_request_duration_seconds",
    Unit.SECONDS,
    "Time that the training worker spent on a request, by kind.",
    (*_LATENCY, 30.0, 60.0, 300.0),
    _TRAINING_KIND,
)
TRAINING_DATA = _counter(
    "reft_training_data_total",
    Unit.ROWS,
    "Data of training loops that were judged, by outcome.",
    Label("outcome", ("kept", "withheld", "masked")),
)
TRAINING_TOKENS = _counter(
    "reft_training_tokens_total",
    Unit.TOKENS,
    "Tokens of training loops: learned, withheld, unjudged (always 0), of the teacher's guidance, and sampled.",
    Label("content", ("learned", "withheld", "unjudged", "guidance", "sampled")),
)

# The filter

FILTER_ROWS = _counter(
    "reft_filter_rows_total",
    Unit.ROWS,
    "Rows judged by the teacher, by decision and reason.",
    DECISION,
    REASON,
    POLICY,
    STREAM,
    TEACHER,
)
FILTER_SCORE = _histogram(
    "reft_filter_score", Unit.RATIO, "Refusal scores of rows as (1 + cosine) / 2.", SCORE_BUCKETS, STREAM, TEACHER
)
FILTER_REQUEST_SECONDS = _histogram(
    "reft_filter_request_duration_seconds",
    Unit.SECONDS,
    "Time from the arrival of a filter request to its last verdict.",
    _LATENCY,
    STREAM,
)
FILTER_QUEUE_SECONDS = _histogram(
    "reft_filter_queue_seconds", Unit.SECONDS, "Time a call waited for its batch at the teacher.", _LATENCY
)
FILTER_TOKENISE_SECONDS = _histogram(
    "reft_filter_tokenise_seconds", Unit.SECONDS, "Time to tokenise one batch of texts.", _LATENCY
)
FILTER_FORWARD_SECONDS = _histogram(
    "reft_filter_forward_seconds", Unit.SECONDS, "Time of one forward pass up to the feature layer.", _LATENCY
)
FILTER_BATCH_ROWS = _histogram(
    "reft_filter_batch_size_rows", Unit.ROWS, "Texts per forward batch of the teacher.", _POWERS
)
FILTER_BATCH_TOKENS = _histogram(
    "reft_filter_batch_size_tokens",
    Unit.TOKENS,
    "Tokens per forward batch of the teacher, padding included.",
    tuple(float(2**n) for n in range(4, 18)),
)
FILTER_TOKENS = _counter(
    "reft_filter_tokens_total",
    Unit.TOKENS,
    "Tokens processed by the teacher, by content: text or padding.",
    Label("content", ("text", "padding")),
)
FILTER_CACHE = _counter(
    "reft_filter_cache_lookups_total",
    Unit.COUNT,
    "Lookups in the score cache by result.",
    Label("result", ("hit", "miss")),
)
FILTER_TRUNCATIONS = _counter(
    "reft_filter_truncations_total", Unit.ROWS, "Rows with text that was truncated and not scored.", STREAM
)
FILTER_ERRORS = _counter(
    "reft_filter_errors_total",
    Unit.COUNT,
    "Filter requests that failed in the service; the response was an error, never an allow.",
    Label("error_type", ("teacher_unavailable", "teacher_lost", "deadline", "scorer", "guard", "internal")),
)
FILTER_SHED = _counter(
    "reft_filter_shed_requests_total",
    Unit.REQUESTS,
    "Filter requests rejected by load shedding, by reason.",
    Label("reason", ("queue_full", "deadline", "too_large", "verdicts_lag", "draining")),
)
FILTER_QUEUE_DEPTH = _gauge("reft_filter_queue_depth", Unit.ROWS, "Texts waiting for the teacher, per replica.")
FILTER_RETRIES = _counter(
    "reft_filter_batch_retries_total", Unit.COUNT, "Batches retried because a teacher replica was lost or busy."
)
FILTER_SCORE_PSI = _gauge(
    "reft_filter_score_psi",
    Unit.RATIO,
    "Population stability index between recent scores and the teacher's calibration histogram.",
    STREAM,
    TEACHER,
)
FILTER_SCORE_MEAN_SHIFT = _gauge(
    "reft_filter_score_mean_shift",
    Unit.RATIO,
    "Mean of recent scores minus the calibration mean, on the (1 + cosine) / 2 scale.",
    STREAM,
    TEACHER,
)
FILTER_CANARY_RECALL = _gauge(
    "reft_filter_canary_recall_ratio",
    Unit.RATIO,
    "Fraction of the harmful canary prompts that the teacher does not allow.",
    TEACHER,
)
FILTER_CANARY_FALSE_POSITIVES = _gauge(
    "reft_filter_canary_false_positive_ratio",
    Unit.RATIO,
    "Fraction of the harmless canary prompts that the teacher does not allow.",
    TEACHER,
)
TEACHER_INFO = _gauge(
    "reft_teacher_info",
    Unit.INFO,
    "The teacher in use, its layer and thresholds; the value is 1.",
    TEACHER,
    Label("layer", limit=128),
    Label("review_threshold", limit=64),
    Label("block_threshold", limit=64),
)
BUILD_INFO = _gauge(
    "reft_build_info",
    Unit.INFO,
    "The running version; the value is 1.",
    Label("version", limit=8),
    Label("python", limit=8),
)

# Screening and review

SCREENING_ROWS = _counter(
    "reft_screening_rows_total",
    Unit.ROWS,
    "Dataset rows by screening outcome.",
    Label("outcome", ("kept", "review", "blocked", "invalid")),
    PROJECT,
)
SCREENING_BYTES = _counter("reft_screening_bytes_total", Unit.BYTES, "Dataset bytes read by screening.", PROJECT)
SCREENING_DATASETS = _counter(
    "reft_screening_datasets_total",
    Unit.COUNT,
    "Finished screenings by policy and outcome.",
    POLICY,
    Label("outcome", ("passed", "review", "refused", "failed")),
)
SCREENING_SECONDS = _histogram(
    "reft_screening_duration_seconds",
    Unit.SECONDS,
    "Time to screen a dataset; small datasets have at most 100,000 rows.",
    _LONG,
    Label("size", ("small", "large")),
)
SCREENING_FINDINGS = _counter(
    "reft_screening_findings_total",
    Unit.COUNT,
    "Dataset-level findings by kind and severity.",
    Label("finding", limit=32),
    Label("severity", ("low", "medium", "high")),
)
SCREENING_INVALID = _counter(
    "reft_screening_invalid_rows_total",
    Unit.ROWS,
    "Rows that failed validation, by error code.",
    Label("code", limit=32),
)
QUARANTINE_ROWS = _gauge(
    "reft_quarantine_rows",
    Unit.ROWS,
    "Quarantined rows by review state.",
    Label("state", ("pending", "approved", "rejected", "expired")),
)
REVIEW_DECISIONS = _counter(
    "reft_review_decisions_total",
    Unit.ROWS,
    "Reviewed rows by outcome; an approval overturns the filter.",
    Label("outcome", ("approved", "rejected")),
)
REVIEW_AGE = _histogram(
    "reft_review_age_seconds", Unit.SECONDS, "Age of a quarantined row at its review decision.", _LONG
)
REVIEW_OLDEST = _gauge("reft_review_oldest_pending_seconds", Unit.SECONDS, "Age of the oldest row that awaits review.")
REVIEW_OVERTURNED = _gauge(
    "reft_review_overturned_ratio",
    Unit.RATIO,
    "Share of the reviewed withheld rows that people approved, with its 95 % interval.",
    TEACHER,
    BOUND,
)
REVIEW_MISSED = _gauge(
    "reft_review_missed_ratio",
    Unit.RATIO,
    "Share of the reviewed sample of kept rows that people rejected, with its 95 % interval.",
    TEACHER,
    BOUND,
)
REVIEW_FALSE_POSITIVES = _gauge(
    "reft_review_false_positive_ratio",
    Unit.RATIO,
    "Share of harmless rows that jobs withhold, estimated from the decisions of people, with its 95 % interval.",
    TEACHER,
    BOUND,
)

# Invariants

UNACCOUNTED_ROWS = _counter(
    "reft_unaccounted_rows_total",
    Unit.ROWS,
    "Input rows without an outcome (kept, review, blocked or invalid); must stay 0.",
    Label("where", ("screening", "stream", "training")),
)
UNSCREENED_ROWS = _counter(
    "reft_unscreened_training_rows_total", Unit.ROWS, "User rows that reached training without a verdict; must stay 0."
)
AUDIT_BREAKS = _gauge(
    "reft_audit_chain_breaks", Unit.COUNT, "Audit log entries whose hash does not match the chain; must stay 0."
)

# Jobs and training

JOBS = _gauge("reft_jobs", Unit.COUNT, "Finetuning jobs by status.", Label("status", STATUSES + ENDED), PROJECT)
JOB_TRANSITIONS = _counter(
    "reft_job_transitions_total",
    Unit.COUNT,
    "Job status transitions.",
    Label("from_status", ("created", *STATUSES)),
    Label("to_status", STATUSES + ENDED),
)
JOB_FAILURES = _counter(
    "reft_job_failures_total", Unit.COUNT, "Failed jobs by error code.", Label("code", limit=32), PROJECT
)
JOB_QUEUE_SECONDS = _histogram("reft_job_queue_seconds", Unit.SECONDS, "Time a job spent in the queue.", _LONG)
JOB_OLDEST_QUEUED = _gauge("reft_job_oldest_queued_seconds", Unit.SECONDS, "Waiting time of the oldest queued job.")
JOB_SECONDS = _histogram(
    "reft_job_duration_seconds",
    Unit.SECONDS,
    "Time from creation to end of a job, by final status.",
    _LONG,
    Label("status", ENDED),
)
TRAIN_ROWS = _counter(
    "reft_train_rows_total", Unit.ROWS, "Training rows processed.", STAGE, Label("rows", ("user", "alignment"))
)
TRAIN_TOKENS = _counter(
    "reft_train_tokens_total", Unit.TOKENS, "Training tokens processed.", STAGE, Label("rows", ("user", "alignment"))
)
TRAIN_LOSS = _gauge(
    "reft_train_loss",
    Unit.NATS,
    "Loss terms of the last step, in nats per token; the refusal regulariser has no unit.",
    STAGE,
    Label("term", ("task", "distill", "cross_entropy", "refusal", "total")),
)
TRAIN_KL = _gauge("reft_teacher_kl_nats", Unit.NATS, "KL divergence from teacher to student on alignment tokens.")
TRAIN_STEP_SECONDS = _histogram(
    "reft_train_step_duration_seconds",
    Unit.SECONDS,
    "Duration of an optimizer step.",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    STAGE,
)
TRAIN_RESTARTS = _counter(
    "reft_train_worker_restarts_total", Unit.COUNT, "Training restarts after the loss of a worker.", STAGE
)

# Safety evaluation of finetuned models

SAFETY_EVAL = _gauge(
    "reft_safety_eval_ratio",
    Unit.RATIO,
    "Last evaluation of base and student: harmful score, over-refusal, finetune accuracy or coherence.",
    Label("suite", limit=32),
    Label("measure", ("harmful_score", "over_refusal", "finetune_accuracy", "coherence")),
    MODEL,
)
SAFETY_EVALS = _counter(
    "reft_safety_evaluations_total",
    Unit.COUNT,
    "Safety evaluations by outcome.",
    Label("suite", limit=32),
    Label("outcome", ("completed", "failed")),
)
GATE_RESULTS = _counter(
    "reft_gate_results_total",
    Unit.COUNT,
    "Release gate decisions on finetuned models.",
    Label("result", ("passed", "withheld", "error")),
)

# Chat, whichever engine answers

CHAT_REQUESTS = _counter(
    "reft_chat_requests_total",
    Unit.REQUESTS,
    "Completions by outcome; `cancelled` means that the client disconnected.",
    MODEL,
    Label("outcome", ("completed", "overloaded", "failed", "cancelled")),
)
CHAT_FIRST_TOKEN_SECONDS = _histogram(
    "reft_chat_time_to_first_token_seconds",
    Unit.SECONDS,
    "Time from the request to its first token, queueing included.",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    MODEL,
)
CHAT_TOKEN_SECONDS = _histogram(
    "reft_chat_inter_token_seconds",
    Unit.SECONDS,
    "Mean time between the tokens of a completion after its first one.",
    (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0),
    MODEL,
)
CHAT_TOKENS = _counter(
    "reft_chat_tokens_total", Unit.TOKENS, "Tokens of conversations and of completions.", MODEL,
    Label("kind", ("prompt", "completion")),
)  # fmt: skip
CHAT_RUNNING = _gauge("reft_chat_running_requests", Unit.REQUESTS, "Completions in progress, per gateway.")
CHAT_WAITING = _gauge("reft_chat_waiting_requests", Unit.REQUESTS, "Completions that wait, per student replica.")
CHAT_ADAPTERS = _gauge("reft_chat_adapters", Unit.COUNT, "Adapters on disk, per student replica.")
CHAT_ADAPTER_LOOKUPS = _counter(
    "reft_chat_adapter_lookups_total",
    Unit.COUNT,
    "Requests for a finetuned model by whether the replica had its adapter.",
    Label("result", ("hit", "miss")),
)

# The API

API_REQUESTS = _counter(
    "reft_api_requests_total",
    Unit.REQUESTS,
    "HTTP requests by route template, method and status code.",
    Label("route", limit=64),
    Label("method", ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")),
    Label("code", limit=40),
)
API_SECONDS = _histogram(
    "reft_api_request_duration_seconds",
    Unit.SECONDS,
    "Time from the arrival of an HTTP request to the end of its response.",
    _LATENCY,
    Label("route", limit=64),
)
API_IN_FLIGHT = _gauge("reft_api_requests_in_flight", Unit.REQUESTS, "HTTP requests in flight, per gateway.")
RATE_LIMITED = _counter(
    "reft_ratelimit_rejections_total",
    Unit.REQUESTS,
    "Requests rejected by a rate limit or quota.",
    Label("limit", ("requests", "rows", "tokens", "moderation_tokens", "bytes", "jobs")),
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
