"""Prometheus metrics of the operator."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_STAGE_SECONDS = (1, 5, 15, 30, 60, 120, 300, 600, 1800, 3600, 7200, 21600, 86400)

RECONCILE_SECONDS = Histogram(
    "finetune_reconcile_duration_seconds",
    "Time of one reconcile, its API calls included.",
    registry=REGISTRY,
    buckets=_SECONDS,
)
RECONCILE_ERRORS = Counter(
    "finetune_reconcile_errors_total", "Reconciles that failed and are repeated.", registry=REGISTRY
)
QUEUE_DEPTH = Gauge("finetune_queue_depth", "Keys that wait to be reconciled.", registry=REGISTRY)
API_WRITES = Counter("finetune_api_writes_total", "Accepted API writes.", ["verb", "resource"], registry=REGISTRY)
JOBS = Gauge("finetune_jobs", "FineTuneJobs by phase.", ["phase"], registry=REGISTRY)
STAGE_SECONDS = Histogram(
    "finetune_stage_duration_seconds",
    "Time from a stage's Job to its end.",
    ["stage", "outcome"],
    registry=REGISTRY,
    buckets=_STAGE_SECONDS,
)
JOBS_FINISHED = Counter(
    "finetune_jobs_finished_total", "FineTuneJobs that ended.", ["outcome", "reason"], registry=REGISTRY
)
COMBINATIONS = Gauge("finetune_combinations", "AdapterCombinations by phase.", ["phase"], registry=REGISTRY)
COMBINATIONS_FINISHED = Counter(
    "finetune_combinations_finished_total", "AdapterCombinations that ended.", ["outcome", "reason"], registry=REGISTRY
)
PROGRESS_POSTS = Counter(
    "finetune_progress_posts_total", "Progress posts by the answer's code.", ["code"], registry=REGISTRY
)
PROGRESS_WRITES = Counter("finetune_progress_writes_total", "Writes of status.progress.", registry=REGISTRY)
LEADER = Gauge("finetune_leader", "1 while this replica leads.", registry=REGISTRY)
WATCH_MISSED = Counter(
    "finetune_watch_missed_total", "Changes that only the periodic list found.", ["resource"], registry=REGISTRY
)
RESYNC_TIMESTAMP = Gauge("finetune_last_resync_timestamp_seconds", "When the last full list ended.", registry=REGISTRY)
EVENTS_DROPPED = Counter("finetune_events_dropped_total", "Events that were given up.", registry=REGISTRY)
