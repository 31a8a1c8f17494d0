"""Suspending, deleting, deadlines and time to live, with real pods."""

from __future__ import annotations

import json

import pytest

from tests.e2e.stack import Space, condition, finished, is_true, rows, spec_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

LONG = {"length": {"steps": 1_000_000}}
"""Far longer than any test waits."""


def training(job: dict[str, object]) -> bool:
    status = job.get("status", {})
    assert isinstance(status, dict)
    return status.get("phase") == "Training" and (status.get("progress", {}).get("step") or 0) >= 1


def test_suspending_frees_everything_and_resuming_trains_anew(space: Space) -> None:
    space.apply("pause", spec_for(space.put(rows(40)), training={"length": {"steps": 1500}}))
    space.until("pause", training, 300, "training")
    space.patch("pause", {"suspend": True})
    job = space.until("pause", lambda j: is_true(j, "Suspended"), 180, "suspended")
    assert job["status"]["phase"] == "Suspended"
    assert space.pods() == []
    assert space.target.get("jobs", "-n", space.name)["items"] == []
    space.patch("pause", {"suspend": False})
    job = space.until("pause", finished, 600, "finished")
    assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
    assert not is_true(job, "Suspended")
    stages = [a["stage"] for a in job["status"]["attempts"]]
    assert stages.count("train") == 2
    events = space.target.get("events", "-n", space.name, "--field-selector=involvedObject.name=pause")["items"]
    resumed = next(e for e in events if e["reason"] == "Resumed")
    assert "beginning" in (resumed.get("message") or resumed.get("note") or "")


def test_deleting_a_training_job_frees_the_gpu_within_the_grace_period(space: Space) -> None:
    space.apply("gone", spec_for(space.put(rows(40)), training=LONG))
    space.until("gone", training, 300, "training")
    space.target.kubectl("delete", "ftj", "gone", "-n", space.name, "--wait=false")
    space.target.kubectl("wait", "pods", "-n", space.name, "--all", "--for=delete", "--timeout=120s")
    assert space.target.get("configmaps", "-n", space.name, "-l", "finetune.dev/job-name=gone")["items"] == []


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
