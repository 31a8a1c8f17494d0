"""Deletion and suspension in the phases before and after training, and a training Job that is deleted by hand.

While it trains: test_recovery.py. In the queue of a real Kueue: test_kueue_jobs.py.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from demo.target import SYSTEM_NAMESPACE
from finetune_api.names import Stage, job_key, stage_job_name
from tests.e2e.stack import BUCKET, Job, Space, condition, finished, is_true, resting_operator, rows, spec_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
SECONDS = 300
GRACE_SECONDS = 30
"""Of the training pod, and longer than any pod needs to stop."""
OF_OPERATOR = ("-n", SYSTEM_NAMESPACE, "-l", "app.kubernetes.io/name=finetune-operator")


def in_phase(phase: str) -> Callable[[Job], bool]:
    return lambda job: job.get("status", {}).get("phase") == phase


def waits_for(reason: str) -> Callable[[Job], bool]:
    return lambda job: is_true(job, "Waiting") and condition(job, "Waiting")["reason"] == reason


def key(job: Job) -> str:
    """What the names of the job's objects, in the cluster and in the bucket, begin with."""
    return job_key(job["metadata"]["name"], job["metadata"]["uid"])


def stored(space: Space, job: Job) -> dict[str, str]:
    """The job's objects in the bucket, each with its hash."""
    pages = space.bucket.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"results/{key(job)}/")
    return {o["Key"]: o["ETag"] for page in pages for o in page.get("Contents", [])}


def artifacts(space: Space, job: Job) -> dict[str, str]:
    """Those that are published: without the workspace."""
    return {name: etag for name, etag in stored(space, job).items() if "/workspace/" not in name}


def delete(space: Space, *names: str) -> None:
    """Delete jobs; their pods stop within the grace period, and what the jobs had made in the cluster goes with them."""
    began = time.monotonic()
    space.target.kubectl("delete", "ftj", *names, "-n", space.name, "--wait=false")
    selector = f"finetune.dev/job-name in ({','.join(names)})"
    space.target.kubectl("wait", "pods", "-n", space.name, "-l", selector, "--for=delete", "--timeout=60s")
    assert time.monotonic() - began < GRACE_SECONDS
    space.target.kubectl("wait", "jobs,configmaps", "-n", space.name, "-l", selector, "--for=delete", "--timeout=60s")


def suspended(space: Space, name: str) -> None:
    """Suspend a job, see that it holds nothing, and let it go on."""
    space.patch(name, {"suspend": True})
    job = space.until(name, lambda j: is_true(j, "Suspended"), 120, "suspended")
    assert job["status"]["phase"] == "Suspended"
    assert space.pods() == []
    assert space.target.get("jobs", "-n", space.name)["items"] == []
    space.patch(name, {"suspend": False})


def no_such_gpu(data: str, **fields: Any) -> dict[str, Any]:
    """A job that is queued for as long as it lives."""
    return spec_for(data, compute={"gpu": {"product": "Unobtainium"}}, **fields)


def test_deleted_before_and_after_training_a_job_holds_nothing_and_what_it_stored_stays(space: Space) -> None:
    data = space.put(rows(40))
    space.apply("publishing", spec_for(data))
    space.apply("preparing", spec_for(data, output={"secretRef": {"name": "nobody-makes-it"}}))
    space.apply("queued", no_such_gpu(data))
    preparing = space.until("preparing", waits_for("SecretMissing"), SECONDS, "waiting for a Secret")
    queued = space.until("queued", waits_for("Unschedulable"), SECONDS, "waiting for a GPU")
    assert [preparing["status"]["phase"], queued["status"]["phase"]] == ["Preparing", "Queued"]
    before = stored(space, queued)
    assert before, "what prepare left"
    delete(space, "preparing", "queued")
    assert stored(space, queued) == before

    publishing = space.until("publishing", in_phase("Publishing"), SECONDS, "Publishing")
    before = artifacts(space, publishing)
    assert any("/adapter/" in name for name in before)
    delete(space, "publishing")
    assert before.items() <= artifacts(space, publishing).items()
    assert space.pods() == []


def test_suspended_before_and_after_training_and_without_its_training_job_a_job_trains_once(space: Space) -> None:
    # With its workspace kept, since publish deletes it some moments before its Job is seen to be complete.
    output = {"deletionPolicy": "Delete", "workspace": {"retention": "Keep"}}
    space.apply("once", spec_for(space.put(rows(40)), output=output))
    space.until("once", in_phase("Preparing"), SECONDS, "Preparing")
    suspended(space, "once")

    job = space.until("once", in_phase("Training"), SECONDS, "Training")
    train = f"job/{stage_job_name('once', job['metadata']['uid'], Stage.TRAIN)}"
    with resting_operator(space.target):
        space.target.kubectl("wait", train, "-n", space.name, "--for=condition=Complete", "--timeout=120s")
        space.target.kubectl("delete", train, "-n", space.name)
        assert not is_true(space.job("once"), "Trained"), "nobody has seen that it was complete"
    trained = artifacts(space, job)
    assert any("/adapter/" in name for name in trained)

    space.until("once", in_phase("Publishing"), SECONDS, "Publishing")
    suspended(space, "once")
    job = space.until("once", finished, SECONDS, "finished")
    assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
    assert [a["stage"] for a in job["status"]["attempts"]].count("train") == 1, json.dumps(job["status"], indent=1)
    assert condition(job, "Trained")["reason"] == "AlreadyTrained"
    assert len(space.gpu_pods.so_far()) == 1, "no other pod ever asked for a GPU"
    published = artifacts(space, job)
    assert trained.items() <= published.items(), "the adapter of that one pod"
    assert any(name.endswith("/manifest.json") for name in published)

    space.target.kubectl("delete", "ftj", "once", "-n", space.name, "--wait=false")
    space.target.kubectl("wait", "ftj/once", "-n", space.name, "--for=delete", "--timeout=120s")
    assert stored(space, job) == {}
    cleanup = space.target.get("job", stage_job_name("once", job["metadata"]["uid"], Stage.CLEANUP), "-n", space.name)
    assert cleanup["status"]["succeeded"] == 1
    space.until_told("once", "OutputDeleted")


def test_a_namespace_that_is_being_deleted_is_not_held_up_and_what_stays_is_told(space: Space) -> None:
    space.apply("doomed", no_such_gpu(space.put(rows(40)), output={"deletionPolicy": "Delete"}))
    job = space.until("doomed", waits_for("Unschedulable"), SECONDS, "waiting for a GPU")
    before = stored(space, job)
    assert before
    space.target.kubectl("delete", "namespace", space.name, "--wait=false")
    space.target.kubectl("wait", f"namespace/{space.name}", "--for=delete", "--timeout=120s")
    assert stored(space, job) == before
    # Nothing can be created in a namespace that goes, neither a cleanup Job nor an Event: the operator's log tells.
    log = space.target.kubectl("logs", *OF_OPERATOR, "--tail=-1")
    told = [line for line in log.splitlines() if "OutputLeft" in line and key(job) in line]
    assert any("WARNING" in line and "its namespace is being deleted" in line for line in told), told
