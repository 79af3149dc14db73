"""The metric catalogue: the only file that contains metric names.

Conventions: base units, counters end in `_total`, labels are bounded, and no label contains row text or the id of a
row, job or user. Cosines are recorded as (1 + cos) / 2, because Ray histograms need positive bucket bounds. Recorders
add the label `application` to every metric.
"""

from __future__ import annotations

from reft_ray.telemetry import labels
from reft_ray.telemetry.metric_types import Label, Metric, Unit, counter, gauge, histogram

# The training API

TRAINING_REQUESTS = counter(
    "reft_training_requests_total",
    Unit.REQUESTS,
    "Requests of training loops that ended, by kind and status.",
    labels.TRAINING_KIND,
    Label("status", ("done", "failed")),
)
TRAINING_REQUEST_SECONDS = histogram(
    "reft_training_request_duration_seconds",
    Unit.SECONDS,
    "Time that the training worker spent on a request, by kind.",
    (*labels.LATENCY, 30.0, 60.0, 300.0),
    labels.TRAINING_KIND,
)
TRAINING_DATA = counter(
    "reft_training_data_total",
    Unit.ROWS,
    "Data of training loops that were judged, by outcome.",
    Label("outcome", ("kept", "withheld", "masked")),
)
TRAINING_TOKENS = counter(
    "reft_training_tokens_total",
    Unit.TOKENS,
    "Tokens of training loops: learned, withheld, unjudged (always 0), of the teacher's guidance, and sampled.",
    Label("content", ("learned", "withheld", "unjudged", "guidance", "sampled")),
)

# The filter

FILTER_ROWS = counter(
    "reft_filter_rows_total",
    Unit.ROWS,
    "Rows judged by the teacher, by decision and reason.",
    labels.DECISION,
    labels.REASON,
    labels.POLICY,
    labels.STREAM,
    labels.TEACHER,
)
FILTER_SCORE = histogram(
    "reft_filter_score",
    Unit.RATIO,
    "Refusal scores of rows as (1 + cosine) / 2.",
    labels.SCORE_BUCKETS,
    labels.STREAM,
    labels.TEACHER,
)
FILTER_REQUEST_SECONDS = histogram(
    "reft_filter_request_duration_seconds",
    Unit.SECONDS,
    "Time from the arrival of a filter request to its last verdict.",
    labels.LATENCY,
    labels.STREAM,
)
FILTER_QUEUE_SECONDS = histogram(
    "reft_filter_queue_seconds", Unit.SECONDS, "Time a call waited for its batch at the teacher.", labels.LATENCY
)
FILTER_TOKENISE_SECONDS = histogram(
    "reft_filter_tokenise_seconds", Unit.SECONDS, "Time to tokenise one batch of texts.", labels.LATENCY
)
FILTER_FORWARD_SECONDS = histogram(
    "reft_filter_forward_seconds", Unit.SECONDS, "Time of one forward pass up to the feature layer.", labels.LATENCY
)
FILTER_BATCH_ROWS = histogram(
    "reft_filter_batch_size_rows", Unit.ROWS, "Texts per forward batch of the teacher.", labels.POWERS
)
FILTER_BATCH_TOKENS = histogram(
    "reft_filter_batch_size_tokens",
    Unit.TOKENS,
    "Tokens per forward batch of the teacher, padding included.",
    tuple(float(2**n) for n in range(4, 18)),
)
FILTER_TOKENS = counter(
    "reft_filter_tokens_total",
    Unit.TOKENS,
    "Tokens processed by the teacher, by content: text or padding.",
    Label("content", ("text", "padding")),
)
FILTER_CACHE = counter(
    "reft_filter_cache_lookups_total",
    Unit.COUNT,
    "Lookups in the score cache by result.",
    Label("result", ("hit", "miss")),
)
FILTER_TRUNCATIONS = counter(
    "reft_filter_truncations_total", Unit.ROWS, "Rows with text that was truncated and not scored.", labels.STREAM
)
FILTER_ERRORS = counter(
    "reft_filter_errors_total",
    Unit.COUNT,
    "Filter requests that failed in the service; the response was an error, never an allow.",
    Label("error_type", ("teacher_unavailable", "teacher_lost", "deadline", "scorer", "guard", "internal")),
)
FILTER_SHED = counter(
    "reft_filter_shed_requests_total",
    Unit.REQUESTS,
    "Filter requests rejected by load shedding, by reason.",
    Label("reason", ("queue_full", "deadline", "too_large", "verdicts_lag", "draining")),
)
FILTER_QUEUE_DEPTH = gauge("reft_filter_queue_depth", Unit.ROWS, "Texts waiting for the teacher, per replica.")
FILTER_RETRIES = counter(
    "reft_filter_batch_retries_total", Unit.COUNT, "Batches retried because a teacher replica was lost or busy."
)
FILTER_SCORE_PSI = gauge(
    "reft_filter_score_psi",
    Unit.RATIO,
    "Population stability index between recent scores and the teacher's calibration histogram.",
    labels.STREAM,
    labels.TEACHER,
)
FILTER_SCORE_MEAN_SHIFT = gauge(
    "reft_filter_score_mean_shift",
    Unit.RATIO,
    "Mean of recent scores minus the calibration mean, on the (1 + cosine) / 2 scale.",
    labels.STREAM,
    labels.TEACHER,
)
FILTER_CANARY_RECALL = gauge(
    "reft_filter_canary_recall_ratio",
    Unit.RATIO,
    "Fraction of the harmful canary prompts that the teacher does not allow.",
    labels.TEACHER,
)
FILTER_CANARY_FALSE_POSITIVES = gauge(
    "reft_filter_canary_false_positive_ratio",
    Unit.RATIO,
    "Fraction of the harmless canary prompts that the teacher does not allow.",
    labels.TEACHER,
)
TEACHER_INFO = gauge(
    "reft_teacher_info",
    Unit.INFO,
    "The teacher in use, its layer and thresholds; the value is 1.",
    labels.TEACHER,
    Label("layer", limit=128),
    Label("review_threshold", limit=64),
    Label("block_threshold", limit=64),
)
BUILD_INFO = gauge(
    "reft_build_info",
    Unit.INFO,
    "The running version; the value is 1.",
    Label("version", limit=8),
    Label("python", limit=8),
)

# Screening and review

SCREENING_ROWS = counter(
    "reft_screening_rows_total",
    Unit.ROWS,
    "Dataset rows by screening outcome.",
    Label("outcome", ("kept", "review", "blocked", "invalid")),
    labels.PROJECT,
)
SCREENING_BYTES = counter("reft_screening_bytes_total", Unit.BYTES, "Dataset bytes read by screening.", labels.PROJECT)
SCREENING_DATASETS = counter(
    "reft_screening_datasets_total",
    Unit.COUNT,
    "Finished screenings by policy and outcome.",
    labels.POLICY,
    Label("outcome", ("passed", "review", "refused", "failed")),
)
SCREENING_SECONDS = histogram(
    "reft_screening_duration_seconds",
    Unit.SECONDS,
    "Time to screen a dataset; small datasets have at most 100,000 rows.",
    labels.LONG,
    Label("size", ("small", "large")),
)
SCREENING_FINDINGS = counter(
    "reft_screening_findings_total",
    Unit.COUNT,
    "Dataset-level findings by kind and severity.",
    Label("finding", limit=32),
    Label("severity", ("low", "medium", "high")),
)
SCREENING_INVALID = counter(
    "reft_screening_invalid_rows_total",
    Unit.ROWS,
    "Rows that failed validation, by error code.",
    Label("code", limit=32),
)
QUARANTINE_ROWS = gauge(
    "reft_quarantine_rows",
    Unit.ROWS,
    "Quarantined rows by review state.",
    Label("state", ("pending", "approved", "rejected", "expired")),
)
REVIEW_DECISIONS = counter(
    "reft_review_decisions_total",
    Unit.ROWS,
    "Reviewed rows by outcome; an approval overturns the filter.",
    Label("outcome", ("approved", "rejected")),
)
REVIEW_AGE = histogram(
    "reft_review_age_seconds", Unit.SECONDS, "Age of a quarantined row at its review decision.", labels.LONG
)
REVIEW_OLDEST = gauge("reft_review_oldest_pending_seconds", Unit.SECONDS, "Age of the oldest row that awaits review.")
REVIEW_OVERTURNED = gauge(
    "reft_review_overturned_ratio",
    Unit.RATIO,
    "Share of the reviewed withheld rows that people approved, with its 95 % interval.",
    labels.TEACHER,
    labels.BOUND,
)
REVIEW_MISSED = gauge(
    "reft_review_missed_ratio",
    Unit.RATIO,
    "Share of the reviewed sample of kept rows that people rejected, with its 95 % interval.",
    labels.TEACHER,
    labels.BOUND,
)
REVIEW_FALSE_POSITIVES = gauge(
    "reft_review_false_positive_ratio",
    Unit.RATIO,
    "Share of harmless rows that jobs withhold, estimated from the decisions of people, with its 95 % interval.",
    labels.TEACHER,
    labels.BOUND,
)

# Invariants

UNACCOUNTED_ROWS = counter(
    "reft_unaccounted_rows_total",
    Unit.ROWS,
    "Input rows without an outcome (kept, review, blocked or invalid); must stay 0.",
    Label("where", ("screening", "stream", "training")),
)
UNSCREENED_ROWS = counter(
    "reft_unscreened_training_rows_total", Unit.ROWS, "User rows that reached training without a verdict; must stay 0."
)
AUDIT_BREAKS = gauge(
    "reft_audit_chain_breaks", Unit.COUNT, "Audit log entries whose hash does not match the chain; must stay 0."
)

# Jobs and training

JOBS = gauge(
    "reft_jobs",
    Unit.COUNT,
    "Finetuning jobs by status.",
    Label("status", labels.STATUSES + labels.ENDED),
    labels.PROJECT,
)
JOB_TRANSITIONS = counter(
    "reft_job_transitions_total",
    Unit.COUNT,
    "Job status transitions.",
    Label("from_status", ("created", *labels.STATUSES)),
    Label("to_status", labels.STATUSES + labels.ENDED),
)
JOB_FAILURES = counter(
    "reft_job_failures_total", Unit.COUNT, "Failed jobs by error code.", Label("code", limit=32), labels.PROJECT
)
JOB_QUEUE_SECONDS = histogram("reft_job_queue_seconds", Unit.SECONDS, "Time a job spent in the queue.", labels.LONG)
JOB_OLDEST_QUEUED = gauge("reft_job_oldest_queued_seconds", Unit.SECONDS, "Waiting time of the oldest queued job.")
JOB_SECONDS = histogram(
    "reft_job_duration_seconds",
    Unit.SECONDS,
    "Time from creation to end of a job, by final status.",
    labels.LONG,
    Label("status", labels.ENDED),
)
TRAIN_ROWS = counter(
    "reft_train_rows_total", Unit.ROWS, "Training rows processed.", labels.STAGE, Label("rows", ("user", "alignment"))
)
TRAIN_TOKENS = counter(
    "reft_train_tokens_total",
    Unit.TOKENS,
    "Training tokens processed.",
    labels.STAGE,
    Label("rows", ("user", "alignment")),
)
TRAIN_LOSS = gauge(
    "reft_train_loss",
    Unit.NATS,
    "Loss terms of the last step, in nats per token; the refusal regulariser has no unit.",
    labels.STAGE,
    Label("term", ("task", "distill", "cross_entropy", "refusal", "total")),
)
TRAIN_KL = gauge("reft_teacher_kl_nats", Unit.NATS, "KL divergence from teacher to student on alignment tokens.")
TRAIN_STEP_SECONDS = histogram(
    "reft_train_step_duration_seconds",
    Unit.SECONDS,
    "Duration of an optimizer step.",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0),
    labels.STAGE,
)
TRAIN_RESTARTS = counter(
    "reft_train_worker_restarts_total", Unit.COUNT, "Training restarts after the loss of a worker.", labels.STAGE
)

# Safety evaluation of finetuned models

SAFETY_EVAL = gauge(
    "reft_safety_eval_ratio",
    Unit.RATIO,
    "Last evaluation of base and student: harmful score, over-refusal, finetune accuracy or coherence.",
    Label("suite", limit=32),
    Label("measure", ("harmful_score", "over_refusal", "finetune_accuracy", "coherence")),
    labels.MODEL,
)
SAFETY_EVALS = counter(
    "reft_safety_evaluations_total",
    Unit.COUNT,
    "Safety evaluations by outcome.",
    Label("suite", limit=32),
    Label("outcome", ("completed", "failed")),
)
GATE_RESULTS = counter(
    "reft_gate_results_total",
    Unit.COUNT,
    "Release gate decisions on finetuned models.",
    Label("result", ("passed", "withheld", "error")),
)

# Chat, whichever engine answers

CHAT_REQUESTS = counter(
    "reft_chat_requests_total",
    Unit.REQUESTS,
    "Completions by outcome; `cancelled` means that the client disconnected.",
    labels.MODEL,
    Label("outcome", ("completed", "overloaded", "failed", "cancelled")),
)
CHAT_FIRST_TOKEN_SECONDS = histogram(
    "reft_chat_time_to_first_token_seconds",
    Unit.SECONDS,
    "Time from the request to its first token, queueing included.",
    (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
    labels.MODEL,
)
CHAT_TOKEN_SECONDS = histogram(
    "reft_chat_inter_token_seconds",
    Unit.SECONDS,
    "Mean time between the tokens of a completion after its first one.",
    (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0),
    labels.MODEL,
)
CHAT_TOKENS = counter(
    "reft_chat_tokens_total", Unit.TOKENS, "Tokens of conversations and of completions.", labels.MODEL,
    Label("kind", ("prompt", "completion")),
)  # fmt: skip
CHAT_RUNNING = gauge("reft_chat_running_requests", Unit.REQUESTS, "Completions in progress, per gateway.")
CHAT_WAITING = gauge("reft_chat_waiting_requests", Unit.REQUESTS, "Completions that wait, per student replica.")
CHAT_ADAPTERS = gauge("reft_chat_adapters", Unit.COUNT, "Adapters on disk, per student replica.")
CHAT_ADAPTER_LOOKUPS = counter(
    "reft_chat_adapter_lookups_total",
    Unit.COUNT,
    "Requests for a finetuned model by whether the replica had its adapter.",
    Label("result", ("hit", "miss")),
)

# The API

API_REQUESTS = counter(
    "reft_api_requests_total",
    Unit.REQUESTS,
    "HTTP requests by route template, method and status code.",
    Label("route", limit=64),
    Label("method", ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS")),
    Label("code", limit=40),
)
API_SECONDS = histogram(
    "reft_api_request_duration_seconds",
    Unit.SECONDS,
    "Time from the arrival of an HTTP request to the end of its response.",
    labels.LATENCY,
    Label("route", limit=64),
)
API_IN_FLIGHT = gauge("reft_api_requests_in_flight", Unit.REQUESTS, "HTTP requests in flight, per gateway.")
RATE_LIMITED = counter(
    "reft_ratelimit_rejections_total",
    Unit.REQUESTS,
    "Requests rejected by a rate limit or quota.",
    Label("limit", ("requests", "rows", "tokens", "moderation_tokens", "bytes", "jobs")),
)

METRICS: tuple[Metric, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Metric))
