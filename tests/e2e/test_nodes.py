"""Training pods that train together, on the real cluster."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from finetune_api.names import LABEL_NAME, LABEL_STAGE, Stage
from finetune_cluster.processes import Process, of_container
from tests.chaos.kills import container_of, end, worker
from tests.e2e.stack import BUCKET, Space, condition, finished, is_true, rows, spec_for
from tests.e2e.test_job import artifacts
from tests.support.ends import watched

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]
INDEX = "batch.kubernetes.io/job-completion-index"
MOST_SECONDS = 60
"""For all ranks to stop when one is dead."""


def train_pods(space: Space, name: str) -> dict[int, dict[str, Any]]:
    """The training pods of a job that have not ended, by index."""
    labels = {LABEL_NAME: name, LABEL_STAGE: Stage.TRAIN.value}
    found = [p for p in space.pods() if labels.items() <= p["metadata"]["labels"].items()]
    live = [
        p for p in found if p["status"]["phase"] in ("Pending", "Running") and "deletionTimestamp" not in p["metadata"]
    ]
    return {int(p["metadata"]["annotations"][INDEX]): p for p in live}


def step(job: dict[str, Any]) -> int:
    """The last step that was told."""
    return int(((job.get("status") or {}).get("progress") or {}).get("step") or 0)


def curve(space: Space, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Losses and learning rates by step."""
    prefix, _ = artifacts(space, job)
    text = space.bucket.get_object(Bucket=BUCKET, Key=f"{prefix}/reports/metrics.jsonl")["Body"].read().decode()
    return [json.loads(line) for line in text.splitlines()]


def test_two_pods_learn_what_one_process_learns_although_one_is_deleted_on_the_way(space: Space) -> None:
    data = space.put(rows(40))
    training = {"length": {"steps": 80}, "globalBatchSequences": 6}
    checkpoints = {"checkpoint": {"interval": {"steps": 25}}}
    same = {"method": {"lora": {"rank": 4, "dropout": 0.0}}}
    pair = {"training": {**training, "parallelism": "FSDP"}, "compute": {"nodes": 2}, "recovery": checkpoints}
    space.apply("pair", spec_for(data, **same, **pair))
    space.until("pair", lambda job: step(job) >= 3, 600, "three steps")
    before = train_pods(space, "pair")
    assert sorted(before) == [0, 1]
    space.target.kubectl("delete", "pod", "-n", space.name, before[1]["metadata"]["name"], "--wait=false")
    space.apply("alone", spec_for(data, **same, training=training))
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
    for key in ("loss", "held_out_loss"):
        ours, theirs = ([line[key] for line in lines if key in line] for lines in (together, single))
        assert theirs
        assert ours == pytest.approx(theirs, rel=1e-3)


def test_two_jobs_that_hold_each_other_up_let_go_one_after_the_other(space: Space) -> None:
    """Two GPUs, two jobs that need both: the pod of the first that is deleted loses its GPU to the second, which has waited longer."""
    data = space.put(rows(40))
    patience = {"placementTimeoutSeconds": 40, "checkpoint": {"interval": {"steps": 25}}}
    two = {"compute": {"nodes": 2}, "recovery": patience}
    space.apply("first", spec_for(data, **two, training={"length": {"steps": 300}}))
    space.until("first", lambda job: step(job) >= 3, 600, "three steps")
    space.apply("second", spec_for(data, **two))
    space.until("second", lambda _: len(train_pods(space, "second")) == 2, 300, "its pods wait for a GPU")
    pod = train_pods(space, "first")[1]["metadata"]["name"]
    space.target.kubectl("delete", "pod", "-n", space.name, pod, "--wait=false")

    def half_placed(_: dict[str, Any]) -> bool:
        bound = [
            len([p for p in train_pods(space, name).values() if p["spec"].get("nodeName")])
            for name in ("first", "second")
        ]
        return bound == [1, 1]

    space.until("second", half_placed, 120, "each holds one of the two GPUs")
    jobs = [space.until(name, finished, 600, "finished") for name in ("first", "second")]
    for job in jobs:
        assert is_true(job, "Complete"), condition(job, "Failed")
    reasons = {a.get("reason") for job in jobs for a in job["status"]["attempts"]}
    assert "PodsMissing" in reasons, "one of them let go"


def rank(pod: dict[str, Any]) -> Process:
    """The process of a pod that trains."""
    return worker(of_container(container_of(pod)))


def rank_failures(job: dict[str, Any]) -> list[str]:
    """What status tells of ranks that died."""
    return [r["message"] for r in job["status"].get("recoveries", []) if r["reason"] == "RankFailure"]


def test_a_dead_rank_stops_those_of_all_pods_and_status_says_which_it_was(space: Space) -> None:
    training = {"length": {"steps": 5000}, "globalBatchSequences": 6, "parallelism": "FSDP"}
    space.apply("dies", spec_for(space.put(rows(40)), training=training, compute={"nodes": 2}))
    space.until("dies", lambda job: step(job) >= 3, 600, "three steps")
    pods = train_pods(space, "dies")
    for count, index in enumerate((1, 0), start=1):
        ranks = {i: rank(pod) for i, pod in pods.items()}
        with watched(process.pid for process in ranks.values()) as both:
            began = end(ranks[index])
            both.all_within(MOST_SECONDS)
        stopped = time.time() - began
        job = space.until("dies", lambda job: len(rank_failures(job)) == count, 120, "the failure is told")  # noqa: B023
        told = time.time() - began
        assert f"rank {index} was ended by SIGKILL while Training" in rank_failures(job)[-1], job["status"]
        print(f"rank {index} killed: all stopped after {stopped:.2f} s, told after {told:.0f} s")  # noqa: T201
        space.until("dies", lambda now: step(now) != step(job), 300, "they train again")  # noqa: B023
    kept = {index: pod["metadata"]["uid"] for index, pod in train_pods(space, "dies").items()}
    assert kept == {index: pod["metadata"]["uid"] for index, pod in pods.items()}, "the same pods throughout"
