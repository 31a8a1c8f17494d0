"""Watches that lose, double, reorder and end: the periodic list and the versions of objects make it good."""

from __future__ import annotations

import random
import threading
import time

import pytest

from finetune_api.failures import FAILURES, Reason
from finetune_api.names import Stage
from finetune_cluster.steps import Pod, Running, Step, Terminated, run_forever
from tests.operator.fault_sweep import broken_invariants
from tests.operator.harness import (
    Bench,
    Recorder,
    condition,
    finetunejobs_of,
    is_true,
    jobs_of,
    name_of,
    pods_of,
    proxied,
    stage_of,
    succeed_stage,
    until_set,
)
from tests.operator.manifests import failure, finetunejob, termination_message
from tests.support.api_proxy import Cut, Event, Gone, Plan

pytestmark = pytest.mark.light


class Liar:
    """Does something to about every third event."""

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._past: dict[str, list[Event]] = {}
        self._held: dict[str, list[Event]] = {}
        self.lies = 0

    def __call__(self, path: str, event: Event) -> list[Event]:
        past = self._past.setdefault(event["object"]["metadata"]["uid"], [])
        past.append(event)
        held = self._held.pop(path, [])
        if self._rng.random() > 0.35:
            return [event, *held]
        self.lies += 1
        match self._rng.randrange(6):
            case 0:
                return held
            case 1:
                return [event, event, *held]
            case 2:
                return [event, *held, self._rng.choice(past)]
            case 3:
                self._held[path] = [*held, event]
                return []
            case 4:
                raise Cut
            case _:
                raise Gone


@pytest.mark.parametrize("seed", [1, 2])
def test_jobs_end_as_they_should_while_every_third_event_is_wrong(bench: Bench, seed: int) -> None:
    liar = Liar(seed)
    names = [f"lied-to-{n}" for n in range(4)]
    jobs, pods = (Recorder(bench.cluster, path) for path in (jobs_of(bench.namespace), pods_of(bench.namespace)))
    with proxied(bench, Plan(watch=liar)) as proxy, bench.script(lambda pod: succeed_stage(pod, 0.2)) as kubelet:
        bench.start_operator(KUBECONFIG=str(proxy.kubeconfig), FINETUNE_RESYNC_SECONDS="2")
        for name in names:
            bench.apply(finetunejob(name).build())
        for name in names:
            done = bench.until_finished(name, 120)
            assert is_true(done, "Complete")
            attempts = [(a["stage"], a["outcome"]) for a in done["status"]["attempts"]]
            assert attempts == [(stage, "Succeeded") for stage in ("prepare", "train", "publish")]
        assert kubelet.errors == []
    assert liar.lies > 10
    told_jobs, told_pods = jobs.stop(), pods.stop()
    for name in names:
        mine = [
            [e for e in told if e[1]["metadata"]["labels"].get("finetune.dev/job-name") == name]
            for told in (told_jobs, told_pods)
        ]
        assert broken_invariants(*mine) == []


def test_what_goes_while_watches_are_down_and_expire_is_noticed(bench: Bench) -> None:
    """After a 410 kopf lists anew and does not tell what is gone."""
    down, finish = threading.Event(), threading.Event()

    def script(pod: Pod) -> list[Step]:
        return run_forever() if stage_of(pod) is Stage.TRAIN and not finish.is_set() else succeed_stage(pod)

    with proxied(bench, Plan(refuse_watches=lambda _: down.is_set())) as proxy, bench.script(script):
        operator = bench.start_operator(KUBECONFIG=str(proxy.kubeconfig), FINETUNE_RESYNC_SECONDS="2")
        for name in ("stays", "goes"):
            bench.apply(finetunejob(name).build())
        training = bench.until_phase("stays", "Training")
        bench.until_phase("goes", "Training")
        down.set()
        proxy.cut_watches()
        finish.set()
        bench.api.delete(f"{finetunejobs_of(bench.namespace)}/goes")
        train = f"{jobs_of(bench.namespace)}/stays-{training['metadata']['uid'][:8]}-train"
        bench.api.delete(train, propagationPolicy="Background")
        done = bench.until_finished("stays", 60)
        down.clear()
        assert is_true(done, "Complete")
        assert operator.process.poll() is None
        bench.until_gone(jobs_of(bench.namespace), query={"labelSelector": "finetune.dev/job-name=goes"})


def test_a_pod_watch_that_lags_behind_makes_no_end_look_lost(bench: Bench) -> None:
    """The pods' events never come, and the next list is far off when the Jobs are told to be over."""
    end = threading.Event()
    bad = failure(Stage.PREPARE, Reason.INVALID_DATA, "train.jsonl, line 7: no messages")

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is not Stage.PREPARE:
            return succeed_stage(pod)
        [*_, ended] = succeed_stage(pod)
        if name_of(pod) == "bad":
            ended = Terminated(FAILURES[Reason.INVALID_DATA].exit_code or 0, termination_message(bad))
        return [Running(), until_set(end), ended]

    pods = pods_of(bench.namespace)
    plan = Plan(watch=lambda path, event: [] if path == pods else [event])
    with proxied(bench, plan) as proxy, bench.script(script):
        bench.start_operator(KUBECONFIG=str(proxy.kubeconfig), FINETUNE_RESYNC_SECONDS="600")
        for name in ("good", "bad"):
            bench.apply(finetunejob(name).build())
        for name in ("good", "bad"):
            bench.until_phase(name, "Preparing")
        # kopf's list and those after 0, 2 and 8 s; the next is due after 26 s.
        late = time.monotonic() + 60
        while plan.requests.count(f"GET {pods}") < 4:
            assert time.monotonic() < late, plan.requests
            threading.Event().wait(0.05)
        end.set()
        failed = bench.until_finished("bad")
        told = condition(failed, "Failed")
        assert told["reason"] == Reason.INVALID_DATA
        assert bad.message in told["message"]
        done = bench.until("good", lambda job: is_true(job, "Prepared"), "Prepared")
        prepared = [a for a in done["status"]["attempts"] if a["stage"] == "prepare"]
        assert [(a["outcome"], a.get("reason")) for a in prepared] == [("Succeeded", "Succeeded")]
