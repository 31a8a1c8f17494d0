"""Every request and watch event of a job's life × every fault: the end is the same as without faults.

    python -m tests.operator.fault_sweep --all [--seed S]     every point; the number of those that passed, and each that did not
                                         [--record FILE]      goes on where an earlier one with this file was cut off

For each point one namespace, one proxy and one operator process of its own, some at a time, on one light cluster.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import httpx

from finetune_api.names import LABEL_STAGE, LABEL_UID, PIPELINE, Stage
from finetune_cluster.light import LightCluster
from finetune_cluster.ports import free_ports
from finetune_cluster.scripted_kubelet import scripted_kubelet
from finetune_cluster.steps import OOM_KILLED, After, Call, Pod, Running, Step, Terminated, run_forever
from tests.operator.certificates import make_tls
from tests.operator.harness import (
    ROOT,
    Bench,
    Recorder,
    Tls,
    combinations_of,
    finetunejobs_of,
    is_true,
    jobs_of,
    name_of,
    stage_of,
    succeed_stage,
)
from tests.operator.manifests import DELETE, Raw, combination, finetunejob, success
from tests.operator.poster import Poster
from tests.operator.remains import bench_in, remains
from tests.support.api_proxy import ApiProxy, EventFault, EventStrike, Fault, Plan, ProxyLoop
from tests.support.apiserver import ApiServer

SUCCEEDS, STOPPED, RESUMED, REPORTED, ELECTED = "succeeds", "stopped", "resumed", "reported", "elected"
COMBINED = "combined"
STORIES = (SUCCEEDS, STOPPED, RESUMED, REPORTED, ELECTED, COMBINED)
"""Names of jobs: one goes from apply to Succeeded; one trains for ever, until it is given a deadline that is over; one is killed for its
memory, trains with more, is suspended and resumed, and then succeeds; of one the operator hears by its pods' posts alone, and what it
stored is deleted with it; one has an operator that leads by a Lease, and of its requests those for the Lease alone are struck; the
last is no FineTuneJob but an AdapterCombination."""
LITTLE, MORE = "4Gi", "6Gi"
MOMENT = 1.2
"""Stages of that one last longer than Kubernetes' times are exact, so that its attempts always stand in one order."""
AT_ONCE = 6
RESYNC_SECONDS = "3"
FINISH_SECONDS = 60
KILLS = (Fault.KILL_BEFORE, Fault.KILL_AFTER)
SETTINGS = {"FINETUNE_RESYNC_SECONDS": RESYNC_SECONDS, "FINETUNE_PROGRESS_URL": "https://operator.test:8443"}
ELECTION = {
    "FINETUNE_LEADER_ELECTION": "true",
    "FINETUNE_LEASE_DURATION_SECONDS": "5",
    "FINETUNE_LEASE_RENEW_DEADLINE_SECONDS": "3",
    "FINETUNE_LEASE_RETRY_SECONDS": "1",
}


@dataclass(frozen=True)
class Point:
    """A fault at the Nth request or watch event of a job's life; none for an undisturbed run."""

    fault: Fault | EventFault | None
    at: int = 0
    story: str = SUCCEEDS

    def __str__(self) -> str:
        return f"{self.fault or 'undisturbed'} #{self.at} of {self.story}"


@dataclass
class Outcome:
    """How a run with one fault ended."""

    point: Point
    hit: str = ""
    """What the fault struck; empty if there were not so many requests."""
    problems: list[str] = field(default_factory=list)
    restarts: int = 0
    """Times the operator ended by itself and was started anew, as a kubelet does."""
    seconds: float = 0.0
    requests: int = 0
    events: int = 0
    left: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether the fault came and made no difference."""
        return bool(self.hit) and not self.problems


class Nursery:
    """Starts operator processes by forking one that has everything imported."""

    def __init__(self) -> None:
        paths = os.pathsep.join(str(ROOT / p) for p in (".", "api", "operator", "cluster"))
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.operator.operator_nursery"],
            env={**os.environ, "PYTHONPATH": paths},
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lock = threading.Lock()

    def start(self, environment: dict[str, str], log: Path, module: str = "finetune_operator.__main__") -> int:
        """A pidfd of a new operator: unlike a process id it never means another process."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with self._lock:
            self._process.stdin.write(json.dumps({"env": environment, "log": str(log), "module": module}) + "\n")
            self._process.stdin.flush()
            return os.pidfd_open(int(self._process.stdout.readline()))

    def close(self) -> None:
        """End; the operators end with it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)


class Kept:
    """An operator that is started anew whenever it ends, as a kubelet does."""

    def __init__(self, nursery: Nursery, bench: Bench, kubeconfig: Path, **env: str) -> None:
        self._nursery, self.bench = nursery, bench
        self._env = {"KUBECONFIG": str(kubeconfig), **SETTINGS, **env}
        self.log = bench.folder / "operator.log"
        self.starts = 0
        self._stop_read, self._stop_write = os.pipe()
        self._lock = threading.Lock()
        self._closed = False
        self.progress_port = 0
        self._fd = self._start()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _start(self) -> int:
        self.starts += 1
        ports = free_ports(3)
        self.progress_port = ports[0]
        return self._nursery.start(self.bench.environment(ports, **self._env), self.log)

    def _keep(self) -> None:
        while True:
            ready, _, _ = select.select([self._fd, self._stop_read], [], [])
            if self._stop_read in ready:
                return
            with self._lock:
                os.close(self._fd)
                self._fd = self._start()

    def kill(self) -> None:
        """SIGKILL."""
        self.send(signal.SIGKILL)

    def send(self, number: signal.Signals) -> None:
        """A signal to the process that runs now."""
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._closed:
                return
            signal.pidfd_send_signal(self._fd, number)

    def close(self) -> None:
        """End it for good."""
        os.write(self._stop_write, b".")
        self._thread.join()
        self.kill()
        with self._lock:
            self._closed = True
        for fd in (self._fd, self._stop_read, self._stop_write):
            os.close(fd)


def broken_invariants(jobs: list[tuple[str, Raw]], pods: list[tuple[str, Raw]]) -> list[str]:
    """What must never have been, in the order of the events: two executions or two unfinished Jobs at a time."""
    problems = []
    live: dict[str, str] = {}
    for kind, job in jobs:
        uid, name = job["metadata"]["uid"], job["metadata"]["name"]
        ended = any(
            c["type"] in ("Complete", "Failed") and c["status"] == "True"
            for c in (job.get("status") or {}).get("conditions") or []
        )
        if kind == "DELETED" or ended:
            live.pop(uid, None)
        else:
            live[uid] = name
        if len(live) > 1:
            problems.append(f"Jobs live together: {sorted(live.values())}")
    running: dict[str, str] = {}
    for kind, pod in pods:
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        if kind != "DELETED" and (pod.get("status") or {}).get("phase") == "Running":
            running[uid] = name
        else:
            running.pop(uid, None)
        if len(running) > 1:
            problems.append(f"pods run together: {sorted(running.values())}")
    return list(dict.fromkeys(problems))


def manifest(story: str) -> Raw:
    """The FineTuneJob of a story."""
    job = finetunejob(story)
    if story == RESUMED:
        recovery = {"maxFailures": 0, "outOfMemory": {"maxMemory": "8Gi"}}
        job.set(compute={"memory": LITTLE}, recovery=recovery)
    if story == REPORTED:
        job.set(**DELETE)
    return job.build()


def collection(bench: Bench, story: str) -> str:
    """Where a story's resource is."""
    return combinations_of(bench.namespace) if story == COMBINED else finetunejobs_of(bench.namespace)


def of_leases(path: str) -> bool:
    """Whether a request is one of the election."""
    return path.startswith("/apis/coordination.k8s.io/")


def memory_of(pod: Pod) -> str:
    """What a pod's container may use; empty without a limit."""
    resources = pod["spec"]["containers"][0].get("resources") or {}
    return str((resources.get("limits") or {}).get("memory", ""))


def script(pod: Pod, resumed: threading.Event | None = None) -> list[Step] | None:
    """Every stage runs for a moment and ends well, but for a training that has no end, or none yet."""
    if LABEL_UID not in (pod["metadata"].get("labels") or {}):
        return None
    training = stage_of(pod) is Stage.TRAIN
    if training and name_of(pod) == STOPPED:
        return run_forever()
    if stage_of(pod) is Stage.CLEANUP:
        return [Running(), Terminated(0)]
    if name_of(pod) != RESUMED:
        return succeed_stage(pod, 0.2)
    if not training:
        return succeed_stage(pod, MOMENT)
    if memory_of(pod) == LITTLE:
        return [Running(), After(MOMENT), OOM_KILLED]
    return succeed_stage(pod, MOMENT) if resumed is not None and resumed.is_set() else run_forever()


def trains_with(job: Raw, memory: str) -> bool:
    """Whether status tells of a training that runs with so much memory."""
    attempts = (job.get("status") or {}).get("attempts") or []
    return any(a["outcome"] == "Running" and a.get("memory") == memory for a in attempts)


def acknowledged(poster: Poster, told: Raw) -> bool:
    """Whether an operator took a post, and wrote it down if it was the last."""
    try:
        answer = poster.post(**told)
    except httpx.TransportError:
        return False
    return answer.status_code == httpx.codes.OK and (answer.json()["recorded"] or "final" not in told)


class Sweep:
    """What all points share."""

    def __init__(self, cluster: LightCluster, tls: Tls, folder: Path, prefix: str = "sweep") -> None:
        self.cluster, self._tls, self._folder, self._prefix = cluster, tls, folder, prefix
        self._stack = contextlib.ExitStack()
        self.undisturbed: dict[str, Outcome] = {}
        self._resumed: dict[str, threading.Event] = defaultdict(threading.Event)
        self._kept: dict[str, Kept] = {}

    def _script(self, pod: Pod) -> list[Step] | None:
        if name_of(pod) == REPORTED and stage_of(pod) in PIPELINE:
            return [Running(), Call(lambda told: asyncio.to_thread(self._post, told)), Terminated(0)]
        return script(pod, self._resumed[pod["metadata"]["namespace"]])

    def _post(self, pod: Pod) -> None:
        """What a trainer does: it posts to whichever operator there is until that has written its outcome down."""
        kept, end = self._kept[pod["metadata"]["namespace"]], time.monotonic() + FINISH_SECONDS
        poster = Poster(kept.bench, kept, pod, name_of(pod), timeout=10)
        with poster.http:
            for told in ({"activity": "Working"}, {"final": success(stage_of(pod)).to_json_dict()}):
                while not acknowledged(poster, told):
                    if time.monotonic() > end:
                        return  # the job's end tells that nobody took it
                    time.sleep(0.2)

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            # Once, and not by several at a time: each writes the same two files.
            self._certificate = self.cluster.certificate("api-proxy")
            self.loop = ProxyLoop()
            stack.callback(self.loop.close)
            self.nursery = Nursery()
            stack.callback(self.nursery.close)
            kubelet = scripted_kubelet(self.cluster.kubeconfig, self._script, name=self._prefix, gpus_per_node=64)
            stack.enter_context(kubelet)
            self._jobs = Recorder(self.cluster, "/apis/batch/v1/jobs", 4 * 3600)
            self._pods = Recorder(self.cluster, "/api/v1/pods", 4 * 3600)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def measure(self) -> dict[str, Outcome]:
        """The undisturbed runs, which say how many points there are and how they are to end."""
        outcomes = self.run_all([Point(None, story=story) for story in STORIES])
        self.undisturbed = {o.point.story: o for o in outcomes}
        for outcome in self.undisturbed.values():
            if outcome.problems:
                raise AssertionError(f"undisturbed: {outcome.problems}")
        return self.undisturbed

    def points(self) -> list[Point]:
        """Every point."""
        return [
            Point(fault, n, story)
            for story, life in self.undisturbed.items()
            for faults, count in ((Fault, life.requests), (EventFault, 0 if story == ELECTED else life.events))
            for fault in faults
            for n in range(1, count + 1)
        ]

    def run_all(self, points: Sequence[Point], at_once: int = AT_ONCE) -> Iterator[Outcome]:
        """Some at a time; outcomes in the order of the points."""
        with ThreadPoolExecutor(at_once) as pool:
            yield from pool.map(self.run, points)

    def run(self, point: Point) -> Outcome:
        """One job's life with one fault."""
        words = f"{point.fault or 'undisturbed'}".lower().replace(" ", "-")
        namespace = f"{self._prefix}-{point.story}-{words}-{point.at}"
        outcome = Outcome(point)
        began = time.monotonic()
        plan = Plan(counts=of_leases) if point.story == ELECTED else Plan()
        strike = EventStrike(point.fault if isinstance(point.fault, EventFault) else EventFault.DOUBLE, point.at)
        plan.watch = strike
        if isinstance(point.fault, Fault):
            plan.fault, plan.at = point.fault, point.at
        with contextlib.ExitStack() as stack:
            bench = stack.enter_context(bench_in(self.cluster, self._tls, self._folder / namespace, namespace))
            proxy = ApiProxy(self.loop, self.cluster.kubeconfig, self._certificate, bench.folder, plan)
            stack.enter_context(proxy)
            holder: list[Kept] = []
            plan.kill = lambda: holder[0].kill() if holder else None
            kept = Kept(self.nursery, bench, proxy.kubeconfig, **(ELECTION if point.story == ELECTED else {}))
            stack.callback(kept.close)
            holder.append(kept)
            self._kept[namespace] = kept
            try:
                if point.story == COMBINED:
                    bench.combine(combination(COMBINED))
                    bench.until_combined(COMBINED, lambda raw: is_true(raw, "Finished"), "Finished", FINISH_SECONDS)
                else:
                    bench.apply(manifest(point.story))
                    self._tell(bench, point.story)
                    bench.until_finished(point.story, FINISH_SECONDS)
                if point.story == STOPPED:
                    selector = {"labelSelector": f"{LABEL_STAGE}={Stage.TRAIN}"}
                    bench.until_gone(jobs_of(namespace), query=selector)
                outcome.left = remains(bench, point.story, collection(bench, point.story))
                outcome.requests, outcome.events = len(plan.requests), strike.count
                outcome.problems += self._differences(point, outcome.left)
                self._delete(bench, point.story)
                if point.story == REPORTED:  # of the others nothing is asked for any more, only listed
                    outcome.requests, outcome.events = len(plan.requests), strike.count
                outcome.problems += broken_invariants(self._jobs.so_far(namespace), self._pods.so_far(namespace))
            except Exception as problem:  # noqa: BLE001 - one point must not end the sweep
                outcome.problems.append(f"{type(problem).__name__}: {str(problem)[:3000]}")
            outcome.hit = (plan.hit or strike.hit).replace(namespace, "NS")
            killed = bool(plan.hit) and point.fault in KILLS
            outcome.restarts = kept.starts - 1 - killed
            if outcome.problems:
                outcome.problems.append(f"log: {kept.log.read_text()[-3000:]}")
        outcome.seconds = time.monotonic() - began
        return outcome

    def _tell(self, bench: Bench, story: str) -> None:
        """What people do in a story."""
        if story == STOPPED:
            bench.until_phase(story, "Training", FINISH_SECONDS)
            bench.merge(story, {"activeDeadlineSeconds": 1})
        elif story == RESUMED:
            bench.until(story, lambda job: trains_with(job, MORE), f"training with {MORE}", FINISH_SECONDS)
            bench.merge(story, {"suspend": True})
            bench.until_phase(story, "Suspended", FINISH_SECONDS)
            self._resumed[bench.namespace].set()
            bench.merge(story, {"suspend": False})

    def _differences(self, point: Point, left: dict[str, Any]) -> list[str]:
        right = self.undisturbed[point.story].left if point.fault else left
        return [f"{k}: {left[k]!r} instead of {right[k]!r}" for k in right if left[k] != right[k]]

    @staticmethod
    def _delete(bench: Bench, name: str) -> None:
        bench.api.delete(f"{collection(bench, name)}/{name}")
        if name == REPORTED:
            bench.until_gone(finetunejobs_of(bench.namespace))
            [cleanup] = [j for j in bench.stage_jobs() if j["metadata"]["labels"][LABEL_STAGE] == Stage.CLEANUP]
            assert cleanup["status"].get("succeeded") == 1, "what it stored is deleted before it goes"
            return
        bench.until_empty()


def sample(points: Sequence[Point], count: int, seed: int) -> list[Point]:
    """Some points of every kind."""
    rng = random.Random(seed)
    kinds = list(dict.fromkeys(p.fault for p in points))
    rng.shuffle(kinds)
    chosen: list[Point] = []
    while len(chosen) < min(count, len(points)):
        for kind in kinds[: count - len(chosen)]:
            left = [p for p in points if p.fault is kind and p not in chosen]
            if left:
                chosen.append(rng.choice(left))
    return chosen


class Record:
    """Outcomes in a file, a line each as they come: a sweep takes more than an hour."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        lines = path.read_text().splitlines() if path is not None and path.exists() else []
        self.outcomes = [self._read(json.loads(line)) for line in lines]

    @staticmethod
    def _read(found: dict[str, Any]) -> Outcome:
        faults: dict[str, Fault | EventFault] = {str(f): f for kind in (Fault, EventFault) for f in kind}
        point = Point(faults[found["fault"]], found["at"], found["story"])
        return Outcome(point, found["hit"], found["problems"], found["restarts"], found["seconds"])

    def left(self, points: Sequence[Point]) -> list[Point]:
        """Those of which nothing is known yet."""
        known = {o.point for o in self.outcomes}
        return [p for p in points if p not in known]

    def add(self, outcome: Outcome) -> None:
        """One more."""
        self.outcomes.append(outcome)
        if self._path is not None:
            point = {"fault": str(outcome.point.fault), "at": outcome.point.at, "story": outcome.point.story}
            told = {**point, **{k: getattr(outcome, k) for k in ("hit", "problems", "restarts", "seconds")}}
            with self._path.open("a") as file:
                file.write(json.dumps(told) + "\n")


def report(outcomes: Sequence[Outcome], seed: int, seconds: float) -> str:
    """What a person reads at the end."""
    lines = [f"seed {seed}, {len(outcomes)} points in {seconds:.0f} s"]
    for kind in dict.fromkeys(o.point.fault for o in outcomes):
        mine = [o for o in outcomes if o.point.fault is kind]
        passed, unreached = sum(o.passed for o in mine), sum(not o.hit and not o.problems for o in mine)
        longest = max(mine, key=lambda o: o.seconds)
        restarts = sum(o.restarts for o in mine)
        lines.append(
            f"{kind!s:>12}: {passed} passed, {sum(bool(o.problems) for o in mine)} failed, {unreached} not reached, "
            f"{restarts} restarts of the operator by itself, longest {longest.seconds:.0f} s ({longest.point})"
        )
    for outcome in outcomes:
        if outcome.problems:
            lines.append(f"FAILED {outcome.point} at {outcome.hit}: " + "\n    ".join(outcome.problems))
    for (fault, hit), count in Counter((o.point.fault, o.hit) for o in outcomes if o.restarts).items():
        lines.append(f"the operator ended by itself after {fault} at {hit} ({count} times)")
    lines.append(f"{sum(o.passed for o in outcomes)} distinct fault points passed")
    return "\n".join(lines)


def good(outcomes: Sequence[Outcome]) -> bool:
    """No point failed, and some faults came: a sweep that struck nothing has shown nothing."""
    return not any(o.problems for o in outcomes) and any(o.hit for o in outcomes)


def main() -> None:
    """Entry point; exits 1 if a point failed, or if no fault came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--all", action="store_true", help="every point")
    which.add_argument("--count", type=int, help="so many, spread over all kinds")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--at-once", type=int, default=AT_ONCE)
    parser.add_argument("--kinds", default="", help="comma-separated faults, instead of all")
    parser.add_argument("--record", type=Path, help="a file of outcomes: points that stand in it are not run again")
    parser.add_argument("--story", choices=STORIES, help="one story instead of all")
    given = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name, LightCluster(Path(name) / "cluster", name="fault-sweep") as cluster:
        ApiServer(cluster.kubeconfig, cluster.kubectl).install_crds()
        with Sweep(cluster, make_tls(Path(name) / "tls"), Path(name)) as sweep:
            for story, life in sweep.measure().items():
                print(f"{story}: {life.requests} requests, {life.events} events, {life.seconds:.1f} s", flush=True)
            kinds = set(given.kinds.split(",")) - {""}
            points = [
                p for p in sweep.points() if (not kinds or str(p.fault) in kinds) and given.story in (None, p.story)
            ]
            chosen = points if given.all else sample(points, given.count, given.seed)
            random.Random(given.seed).shuffle(chosen)
            record = Record(given.record)
            left = record.left(chosen)
            outcomes, total = record.outcomes, len(record.outcomes) + len(left)
            for outcome in sweep.run_all(left, given.at_once):
                record.add(outcome)
                if len(outcomes) % 100 == 0:
                    print(f"{len(outcomes)} of {total} points, {sum(o.passed for o in outcomes)} passed", flush=True)
                if outcome.problems:
                    print(f"FAILED {outcome.point} at {outcome.hit}: {outcome.problems[0][:300]}", flush=True)
    order = [*Fault, *EventFault]
    outcomes.sort(key=lambda o: (order.index(o.point.fault) if o.point.fault else -1, o.point.story, o.point.at))
    print(report(outcomes, given.seed, time.monotonic() - began))
    sys.exit(not good(outcomes))


if __name__ == "__main__":
    main()
