"""Training pods that train together, on the real cluster."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.e2e.stack import BUCKET, Space, condition, finished, is_true, rows, spec_for
from tests.e2e.test_job import artifacts

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
INDEX = "batch.kubernetes.io/job-completion-index"


def train_pods(space: Space, name: str) -> dict[int, dict[str, Any]]:
    """The training pods of a job that have not ended, by index."""
    labels = {"finetune.dev/name": name, "finetune.dev/stage": "train"}
    found = [p for p in space.pods() if labels.items() <= p["metadata"]["labels"].items()]
    live = [
        p for p in found if p["status"]["phase"] in ("Pending", "Running") and "deletionTimestamp" not in p["metadata"]
    ]
    return {int(p["metadata"]["annotations"][INDEX]): p for p in live}


def curve(space: Space, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses and learning rates by step."""
    prefix, _ = artifacts(space, job)
    text = space.bucket.get_object(Bucket=BUCKET, Key=f"{prefix}/reports/metrics.jsonl")["Body"].read().decode()
    return [json.loads(line) for line in text.splitlines()]


def test_two_pods_learn_what_one_process_learns_although_one_is_deleted_on_the_way(space: Space) -> None:
    data = space.put(rows(40))
    training = {"length": {"steps": 60}, "globalBatchSequences": 6}
    checkpoints = {"checkpoint": {"interval": {"steps": 5}}}
    pair = spec_for(data, training={**training, "parallelism": "FSDP"}, compute={"nodes": 2}, recovery=checkpoints)
    space.apply("pair", pair)

    def step(job: dict[str, Any]) -> int:
        return int(((job.get("status") or {}).get("progress") or {}).get("step") or 0)

    space.until("pair", lambda job: step(job) >= 3, 600, "three steps")
    before = train_pods(space, "pair")
    assert sorted(before) == [0, 1]
    space.target.kubectl("delete", "pod", "-n", space.name, before[1]["metadata"]["name"], "--wait=false")
    space.apply("alone", spec_for(data, training=training))
    job = space.until("pair", finished, 600, "finished")
    assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
    attempts = [(a["stage"], a["executionId"]) for a in job["status"]["attempts"] if a["stage"] == "train"]
    assert attempts == [("train", before[0]["metadata"]["uid"])], "the first pod kept its place"
    assert any("Pod 1 was told to stop" in r["message"] for r in job["status"]["recoveries"]), job["status"][
        "recoveries"
    ]

    alone = space.until("alone", finished, 600, "finished")
    assert is_true(alone, "Complete"), json.dumps(alone["status"], indent=1)
    together, single = curve(space, job), curve(space, alone)
    assert [line["step"] for line in together] == [line["step"] for line in single]
    for ours, theirs in zip(together, single, strict=True):
        for key in ("loss", "held_out_loss"):
            assert ours.get(key) == pytest.approx(theirs.get(key), rel=1e-3), (ours, theirs)


def test_a_half_placed_job_gives_its_gpu_back_and_runs_when_there_is_room(space: Space) -> None:
    data = space.put(rows(40))
    space.apply("holder", spec_for(data, training={"length": {"steps": 100_000}}))
    space.until("holder", lambda job: job.get("status", {}).get("phase") == "Training", 600, "Training")
    patience = {"placementTimeoutSeconds": 10}
    space.apply("half", spec_for(data, compute={"nodes": 2}, recovery=patience))

    def given_back(job: dict[str, Any]) -> bool:
        return any(a.get("reason") == "PodsMissing" for a in job.get("status", {}).get("attempts", []))

    job = space.until("half", given_back, 300, "given back")
    assert not finished(job)
    space.target.kubectl("delete", "finetunejob", "-n", space.name, "holder", "--wait=true")
    job = space.until("half", finished, 300, "finished")
    assert is_true(job, "Complete"), condition(job, "Failed")
