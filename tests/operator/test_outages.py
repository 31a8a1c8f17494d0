"""The API server or etcd goes away while a job trains and comes back: the job goes on by itself, and soon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from finetune_api.names import Stage
from finetune_cluster.api import condition as status_of
from finetune_cluster.light import Component, LightCluster
from finetune_cluster.steps import Pod, Running, Step
from tests.operator.fault_sweep import broken_invariants
from tests.operator.harness import Bench, Recorder, is_true, jobs_of, pods_of, stage_of, succeed_stage, until_set
from tests.operator.manifests import finetunejob

pytestmark = pytest.mark.light

SOON = 10.0
"""Seconds from the first answer to a correct status: a retry of a watch or list, and the busy start of the API server itself."""
AWAY = 12.0
"""Long enough for back-offs to have grown."""


def gone_for(seconds: float) -> None:
    """An outage is a time: there is nothing to wait for while it lasts."""
    threading.Event().wait(seconds)


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("component", "end"),
    # An API server that is told to end holds watches open for a minute: that is the same outage, only later.
    [("kube-apiserver", LightCluster.kill), ("etcd", LightCluster.kill), ("etcd", LightCluster.stop)],
)
def test_a_job_in_training_survives_an_outage(
    bench: Bench,
    record_property: Callable[[str, object], None],
    component: Component,
    end: Callable[[LightCluster, Component], None],
) -> None:
    trained = threading.Event()

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is Stage.TRAIN:
            return [Running(), until_set(trained), *succeed_stage(pod)[1:]]
        return succeed_stage(pod)

    operator = bench.start_operator()
    with bench.script(script):
        bench.apply(finetunejob("trains").build())
        uid = bench.until_phase("trains", "Training")["metadata"]["uid"]
        try:
            end(bench.cluster, component)
            gone_for(AWAY)
        finally:
            bench.cluster.start(component)
            bench.cluster.wait_ready()
        back = time.monotonic()
        pods = Recorder(bench.cluster, pods_of(bench.namespace))
        jobs = Recorder(bench.cluster, jobs_of(bench.namespace))
        bench.apply(finetunejob("new").build())
        bench.until("new", lambda j: "phase" in (j.get("status") or {}), "a first status", 60)
        heard = time.monotonic() - back
        trained.set()
        train = f"trains-{uid[:8]}-train"
        complete = lambda j: status_of(j, "Complete") == "True"  # noqa: E731
        bench.api.wait(jobs_of(bench.namespace), train, complete, 90, "the Job controller is back")
        controlled = time.monotonic() - back
        bench.until("trains", lambda j: is_true(j, "Trained"), "Trained", 60)
        told = time.monotonic() - back - controlled
        done = bench.until_finished("trains", 90)
        bench.until_finished("new", 90)
    figures = {
        "until a new job's first status": heard,
        "until the Job controller works again": controlled,
        "from its word to the status": told,
    }
    for name, seconds in figures.items():
        record_property(name, round(seconds, 1))
    print(f"{end.__name__} {component}:", ", ".join(f"{name} {s:.1f} s" for name, s in figures.items()))  # noqa: T201
    assert is_true(done, "Complete")
    assert [a["stage"] for a in done["status"]["attempts"]] == ["prepare", "train", "publish"]
    assert heard < SOON
    assert told < SOON
    assert operator.process.poll() is None, "it was not even restarted"
    for name in ("trains", "new"):
        mine = [
            [e for e in events if e[1]["metadata"]["labels"].get("finetune.dev/job-name") == name]
            for events in (jobs.so_far(), pods.so_far())
        ]
        assert broken_invariants(*mine) == []
