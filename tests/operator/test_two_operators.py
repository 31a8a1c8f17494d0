"""Two operators that both believe that it is their turn: never two executions, and the same end."""

from __future__ import annotations

import signal
import threading
import time
from typing import Any

import pytest
from kubernetes.aio.client import Configuration
from kubernetes.aio.config import load_kube_config

from finetune_api import KIND
from finetune_api.names import PIPELINE, Stage
from finetune_cluster.steps import Pod, Running, Step
from finetune_operator.apply import Applier
from finetune_operator.cache import Cache, Key
from finetune_operator.client import Api, ApiError
from finetune_operator.settings import Settings
from finetune_operator.snapshots import Snapshots
from tests.operator.fault_sweep import broken_invariants
from tests.operator.harness import (
    Bench,
    OperatorProcess,
    Recorder,
    finetunejobs_of,
    is_true,
    jobs_of,
    pods_of,
    stage_of,
    succeed_stage,
    until_set,
)
from tests.operator.manifests import finetunejob

pytestmark = pytest.mark.light

STAGES = [(stage.value, "Succeeded") for stage in PIPELINE]
ELECTION: dict[str, Any] = {
    "FINETUNE_LEADER_ELECTION": "true",
    "FINETUNE_LEASE_DURATION_SECONDS": "4",
    "FINETUNE_LEASE_RENEW_DEADLINE_SECONDS": "3",
    "FINETUNE_LEASE_RETRY_SECONDS": "1",
}


class Witness:
    """What there was of Jobs, pods and FineTuneJobs."""

    def __init__(self, bench: Bench) -> None:
        paths = jobs_of(bench.namespace), pods_of(bench.namespace), finetunejobs_of(bench.namespace)
        self._jobs, self._pods, self._own = (Recorder(bench.cluster, path) for path in paths)

    def pods(self, *names: str) -> int:
        """How many pods there have been of these jobs. (A kubelet also counts what other tests have left.)"""
        mine = (raw["metadata"] for _, raw in self._pods.so_far())
        return len({meta["uid"] for meta in mine if meta["labels"].get("finetune.dev/job-name") in names})

    def problems(self, name: str) -> list[str]:
        """What should not have been, of one job."""
        jobs, pods = (
            [e for e in r.so_far() if e[1]["metadata"]["labels"].get("finetune.dev/job-name") == name]
            for r in (self._jobs, self._pods)
        )
        found = broken_invariants(jobs, pods)
        finished = False
        for _, raw in self._own.so_far():
            if raw["metadata"]["name"] == name:
                if finished and not is_true(raw, "Finished"):
                    found.append("it was finished and then was not")
                finished = finished or is_true(raw, "Finished")
        return found


def attempts(job: dict[str, Any]) -> list[tuple[str, str]]:
    return [(a["stage"], a["outcome"]) for a in job["status"]["attempts"]]


def test_two_operators_without_an_election_do_the_work_of_one(bench: Bench) -> None:
    witness = Witness(bench)
    operators = [bench.start_operator(), bench.start_operator()]
    names = [f"shared-{n}" for n in range(6)]
    with bench.script(lambda pod: succeed_stage(pod, 0.2)) as kubelet:
        for name in names:
            bench.apply(finetunejob(name).build())
        for name in names:
            done = bench.until_finished(name)
            assert is_true(done, "Complete")
            assert attempts(done) == STAGES
        assert witness.pods(*names) == 3 * len(names), "no stage ran twice"
        assert kubelet.errors == []
    for name in names:
        assert witness.problems(name) == []
    assert [o.process.poll() for o in operators] == [None, None]


def until_role(operator: OperatorProcess, role: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while operator.get("/readyz").text != role:
        assert time.monotonic() < end, operator.log.read_text()[-3000:]


@pytest.mark.parametrize("paused_in", [Stage.PREPARE, Stage.TRAIN])
def test_a_leader_that_was_paused_and_wakes_up_changes_nothing(bench: Bench, paused_in: Stage) -> None:
    go = threading.Event()

    def script(pod: Pod) -> list[Step]:
        return [Running(), *([until_set(go)] if stage_of(pod) is paused_in else []), *succeed_stage(pod)[1:]]

    witness = Witness(bench)
    first = bench.start_operator(**ELECTION)
    until_role(first, "leader")
    second = bench.start_operator(**ELECTION)
    with bench.script(script):
        bench.apply(finetunejob("handed").build())
        bench.until_phase("handed", "Preparing" if paused_in is Stage.PREPARE else "Training")
        first.process.send_signal(signal.SIGSTOP)
        until_role(second, "leader")
        go.set()
        done = bench.until_finished("handed")
        first.process.send_signal(signal.SIGCONT)
        assert first.process.wait(30) == 1, "it starts anew, as a standby"
        assert is_true(done, "Complete")
        assert attempts(done) == STAGES
        assert witness.pods("handed") == 3
    assert bench.job("handed")["metadata"]["resourceVersion"] == done["metadata"]["resourceVersion"]
    assert witness.problems("handed") == []


async def test_a_status_that_was_decided_on_an_older_version_is_refused(bench: Bench) -> None:
    """Forced, as server-side apply is for its own fields, it would take back a finished job's status."""
    raw = bench.apply(finetunejob("old").build())
    configuration = Configuration()
    await load_kube_config(str(bench.cluster.kubeconfig), client_configuration=configuration)
    api, settings, cache = Api(configuration), Settings(), Cache()
    try:
        cache.put(KIND, raw)
        seen = cache.jobs[Key(bench.namespace, "old")]
        applier = Applier(api, cache, Snapshots(api, settings), settings)
        newer = seen.status.model_copy(update={"message": "newer"})
        await applier.write_status(seen.view(), newer, seen.resource_version)
        older = seen.status.model_copy(update={"message": "older"})
        with pytest.raises(ApiError) as refused:
            await applier.write_status(seen.view(), older, seen.resource_version)
        assert refused.value.status == 409
        assert bench.job("old")["status"]["message"] == "newer"
        applier.may_act = lambda: False
        with pytest.raises(ApiError, match="LeaseLost"):
            await applier.write_status(seen.view(), older, 0)
        with pytest.raises(ApiError, match="LeaseLost"):
            await applier.create(seen.view(), True, Stage.PREPARE)
        assert bench.stage_jobs() == []
    finally:
        await api.close()
