"""Faults between the operator and the real cluster's API server, at sampled requests and events of a job's life with real pods.

The operator runs here as a process behind a proxy; the cluster's own rests meanwhile.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from demo import images
from finetune_cluster.api import Api
from finetune_cluster.instance import Instance, require
from finetune_cluster.light import LightCluster
from finetune_cluster.node import plane_of
from tests.chaos.run import ended, training_spec
from tests.e2e.stack import Space, Stack, finished, new_space, resting_operator, rows
from tests.operator.certificates import make_tls
from tests.operator.fault_sweep import KILLS, Kept, Nursery, Outcome, Point, broken_invariants, sample
from tests.operator.harness import Bench, Recorder, jobs_of, pods_of
from tests.support.api_proxy import ApiProxy, EventFault, EventStrike, Fault, Plan, ProxyLoop

FINISH_SECONDS = 300.0
STEPS = 3
NAME = "struck"


class FullCluster:
    """What the harness asks of a light cluster, of the full one."""

    def __init__(self, instance: Instance) -> None:
        self._authority = plane_of(instance).authority
        self.kubeconfig = instance.kubeconfig

    def admin(self) -> Api:
        """A connection with all rights."""
        return Api(self.kubeconfig)

    def certificate(self, name: str) -> tuple[Path, Path]:
        """Of a server on loopback."""
        return self._authority.issue(name, name, sans=["127.0.0.1", "localhost"])


class ClusterFaults:
    """What all points share."""

    def __init__(self, stack: Stack, folder: Path) -> None:
        assert stack.target.cluster_name is not None
        self._stack, self._folder = stack, folder
        self._references = images.ensure(stack.target)
        self._cluster = FullCluster(require(stack.target.cluster_name))
        self._tls = make_tls(folder / "tls")
        self._undisturbed: dict[str, Any] = {}

    def run(self, count: int, seed: int, tell: Callable[[Outcome], None]) -> None:
        """So many points, one after the other; ``tell`` hears of each.

        Raises:
            AssertionError: without any fault it did not end as it should.
        """
        with contextlib.ExitStack() as opened:
            opened.enter_context(resting_operator(self._stack.target))
            loop = ProxyLoop()
            opened.callback(loop.close)
            nursery = Nursery()
            opened.callback(nursery.close)
            with new_space(self._stack.target, self._stack.bucket) as space:
                self._spec = training_spec(space.put(rows(40)), STEPS)
            first = self._one(loop, nursery, Point(None))
            assert not first.problems, f"undisturbed: {first.problems}"
            self._undisturbed = first.left
            points = [Point(f, n) for f in Fault for n in range(1, first.requests + 1)]
            points += [Point(f, n) for f in EventFault for n in range(1, first.events + 1)]
            for point in sample(points, count, seed):
                tell(self._one(loop, nursery, point))

    def _one(self, loop: ProxyLoop, nursery: Nursery, point: Point) -> Outcome:
        outcome, began = Outcome(point), time.monotonic()
        try:
            self._live(loop, nursery, point, outcome)
        except Exception as problem:  # noqa: BLE001 - kubectl, API server or store refused: the other points still count
            outcome.problems.append(f"{type(problem).__name__}: {str(problem)[:2000]}")
        outcome.seconds = time.monotonic() - began
        return outcome

    def _live(self, loop: ProxyLoop, nursery: Nursery, point: Point, outcome: Outcome) -> None:
        plan = Plan()
        event = point.fault if isinstance(point.fault, EventFault) else None
        plan.watch = strike = EventStrike(event or EventFault.DOUBLE, point.at if event else 0)
        if isinstance(point.fault, Fault):
            plan.fault, plan.at = point.fault, point.at
        with contextlib.ExitStack() as opened:
            space = opened.enter_context(new_space(self._stack.target, self._stack.bucket))
            folder = self._folder / space.name
            folder.mkdir()
            bench = Bench(cast(LightCluster, self._cluster), folder, self._tls, space.name)
            opened.callback(bench.close)
            certificate = self._cluster.certificate("api-proxy")
            proxy = opened.enter_context(ApiProxy(loop, self._cluster.kubeconfig, certificate, folder, plan))
            holder: list[Kept] = []
            plan.kill = lambda: holder[0].kill() if holder else None
            chosen = {
                "FINETUNE_PREPARE_IMAGE": self._references.prepare,
                "FINETUNE_TRAINER_IMAGE": self._references.trainer,
            }
            kept = Kept(nursery, bench, proxy.kubeconfig, **chosen)
            opened.callback(kept.close)
            holder.append(kept)
            executions = [
                Recorder(cast(LightCluster, self._cluster), path(space.name), 2 * FINISH_SECONDS)
                for path in (jobs_of, pods_of)
            ]
            try:
                outcome.left = self._life(space)
                outcome.problems += [
                    f"{k}: {outcome.left[k]!r} instead of {v!r}"
                    for k, v in self._undisturbed.items()
                    if outcome.left[k] != v
                ]
                space.target.kubectl("delete", "ftj", NAME, "-n", space.name)
                bench.until_empty()
                outcome.problems += broken_invariants(*(each.so_far() for each in executions))
            except Exception:
                outcome.problems.append(f"the operator's log ends with {kept.log.read_text()[-2000:]}")
                raise
            finally:
                outcome.hit = (plan.hit or strike.hit).replace(space.name, "NS")
                outcome.requests, outcome.events = len(plan.requests), strike.count
                outcome.restarts = kept.starts - 1 - (bool(plan.hit) and point.fault in KILLS)

    def _life(self, space: Space) -> dict[str, Any]:
        space.apply(NAME, self._spec)
        job = space.until(NAME, finished, FINISH_SECONDS, "finished")
        status, result = job["status"], ended(space, job)
        return {
            "phase": status["phase"],
            "conditions": [(c["type"], c["status"], c["reason"]) for c in status["conditions"]],
            "attempts": [(a["stage"], a["outcome"]) for a in status["attempts"]],
            "executions of training": result.result["resumedFromSteps"],
            "adapter": result.files,
        }
