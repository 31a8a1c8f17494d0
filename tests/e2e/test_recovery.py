"""A job that is killed, suspended or deleted while it trains: nothing computed is lost, and the adapter is the same bytes.

``make chaos`` kills ten times instead of two.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import pairwise

import pytest

from tests.chaos.run import Lives, ended, live
from tests.chaos.schedule import Kill, Kind
from tests.e2e.conftest import Reference
from tests.e2e.stack import BUCKET, GPU, Job, Space, is_true

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def lives(space: Space) -> Iterator[Lives]:
    """Jobs of the test's namespace, with their logs."""
    with Lives(space) as lives:
        yield lives


def attempts(job: Job, stage: str) -> list[Job]:
    return [a for a in job["status"]["attempts"] if a["stage"] == stage]


def test_after_a_drain_and_a_killed_process_the_adapter_is_the_same_bytes(space: Space, undisturbed: Reference) -> None:
    kills = [Kill(Kind.EVICT, 35), Kill(Kind.WORKER, 70)]
    killed = live(space, "killed", undisturbed.spec, kills)
    assert killed.files == undisturbed.ended.files
    assert killed.job["status"]["phase"] == "Succeeded"
    drained, process = killed.struck
    assert drained.while_training
    assert drained.steps_recomputed == 0, "it saved the step it had made"
    assert process.while_training
    assert 0 <= process.steps_recomputed <= 20
    first, second = attempts(killed.job, "train")
    assert (first["outcome"], first["reason"]) == ("Failed", "Preempted")
    assert "node drained" in first["message"]
    assert second["outcome"] == "Succeeded"
    assert killed.result["resumedFromSteps"][0] == first["lastStep"] == first["checkpointStep"] >= 35
    assert [s for s, t in pairwise(killed.result["resumedFromSteps"]) if s > t] == [], (
        "never back to an older checkpoint"
    )
    assert len(killed.result["resumedFromSteps"]) == 2
    reasons = [r["reason"] for r in killed.job["status"]["recoveries"]]
    assert {"Preempted", "Resumed", "RankFailure"} <= set(reasons), reasons


def test_a_suspended_job_goes_on_from_where_it_was(space: Space, undisturbed: Reference, lives: Lives) -> None:
    pause = lives.begin("pause", undisturbed.spec)
    pause.until_step(35)
    space.patch("pause", {"suspend": True})
    job = pause.until(lambda j: is_true(j, "Suspended"), 120, "suspended")
    assert job["status"]["phase"] == "Suspended"
    assert space.pods() == []
    assert space.target.get("jobs", "-n", space.name)["items"] == []
    made = max(x.step for x in pause.logs.lines if x.step is not None)
    space.patch("pause", {"suspend": False})
    result = ended(space, pause.until_finished())
    assert result.files == undisturbed.ended.files
    assert result.result["resumedFromSteps"] == [made], "not one step is computed again"
    assert len(attempts(result.job, "train")) == 2


def test_a_deleted_job_frees_its_gpu_within_the_grace_period_and_leaves_nothing(
    space: Space, undisturbed: Reference, lives: Lives
) -> None:
    gone = lives.begin("gone", {**undisturbed.spec, "recovery": {"terminationGracePeriodSeconds": 30}})
    gone.until_step(5)
    uid = gone.now()["metadata"]["uid"]
    began = time.monotonic()
    space.target.kubectl("delete", "ftj", "gone", "-n", space.name, "--wait=false")
    space.target.kubectl("wait", "pods", "-n", space.name, "--all", "--for=delete", "--timeout=60s")
    assert time.monotonic() - began < 30
    held = [p for p in space.pods() if GPU in str(p["spec"])]
    assert held == []
    for kind in ("jobs", "configmaps"):
        left = space.target.get(kind, "-n", space.name, "-l", "finetune.dev/job-name=gone")["items"]
        assert left == []
    published = space.bucket.list_objects_v2(Bucket=BUCKET, Prefix=f"results/gone-{uid[:8]}/").get("Contents", [])
    assert [o["Key"] for o in published if "/workspace/" not in o["Key"]] == [], "nothing partial is published"
