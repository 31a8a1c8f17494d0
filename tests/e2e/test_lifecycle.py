"""Deadlines and time to live, with real pods. Suspending and deleting: test_recovery.py."""

from __future__ import annotations

import json

import pytest

from tests.e2e.stack import Space, condition, finished, is_true, rows, spec_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

LONG = {"length": {"steps": 1_000_000}}
"""Far longer than any test waits."""


def test_a_job_past_its_deadline_fails_and_stops(space: Space) -> None:
    space.apply("late", spec_for(space.put(rows(40)), training=LONG, activeDeadlineSeconds=45))
    job = space.until("late", finished, 300, "past its deadline")
    failed = condition(job, "Failed")
    assert failed["reason"] == "DeadlineExceeded"
    assert "activeDeadlineSeconds" in failed["message"]
    space.target.kubectl(
        "wait", "pods", "-n", space.name, "-l", "finetune.dev/stage=train", "--for=delete", "--timeout=150s"
    )


def test_a_finished_job_goes_after_its_time_to_live_and_its_results_stay(space: Space) -> None:
    space.apply("brief", {**spec_for(space.put(rows(40))), "ttlSecondsAfterFinished": 3})
    job = space.until("brief", finished, 600, "finished")
    assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
    space.target.kubectl("wait", "ftj/brief", "-n", space.name, "--for=delete", "--timeout=60s")
    bucket, _, prefix = job["status"]["artifacts"]["uri"].removeprefix("s3://").rstrip("/").partition("/")
    assert space.bucket.head_object(Bucket=bucket, Key=f"{prefix}/manifest.json")["ContentLength"] > 0
