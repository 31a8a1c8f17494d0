"""How many GPUs are free, and who is told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from finetune_api.names import Stage
from finetune_api.snapshot import NodeGpu
from finetune_api.status import ConditionType, GpuStock
from finetune_operator.client import NODES_PATH, ApiError
from finetune_operator.free_gpus import BOUND, FreeGpus, asked_by_node, gpus_of, stock
from finetune_operator.gpus import NodeGpus
from finetune_operator.planning import conditions, plan
from finetune_operator.planning.model import Observation, Plan
from finetune_operator.planning.stock import free_words, stock_wanted
from tests.operator.manifests import Raw, planned_success
from tests.operator.test_gpus import A10, T4, node, refused, spec, taint
from tests.operator.world import World, world

NOTHING: dict[str, int] = {}


def named(name: str, product: str, gpus: int, **fields: Any) -> Raw:
    made = node(product, gpus, **fields)
    made["metadata"]["name"] = name
    return made


def container(gpus: int, **fields: str) -> Raw:
    return {"resources": {"requests": {"nvidia.com/gpu": str(gpus), "cpu": "1"}}, **fields}


def pod(name: str, *gpus: int) -> Raw:
    return {"spec": {"nodeName": name, "containers": [container(n) for n in gpus]}}


def kind(product: str, total: int, free: int | None, nodes: int = 1, most: int | None = None) -> GpuStock:
    """All of them on one node, or as many as ``most`` on each."""
    on_a_node = None if free is None else min(free, most or free)
    return GpuStock(
        product=product, nodes=nodes, total=total, most_per_node=most or total, free=free, most_free_on_a_node=on_a_node
    )


def test_free_is_what_nodes_offer_minus_what_pods_ask_for() -> None:
    nodes = [named("a", A10, 4), named("b", A10, 4), named("c", T4, 2)]
    [a10, t4] = stock(nodes, {"a": 3, "b": 4, "c": 5}, spec())
    assert (a10.total, a10.free, a10.most_free_on_a_node, a10.nodes) == (8, 1, 1, 2)
    assert (t4.total, t4.free) == (2, 0), "more are asked for than there are, as a device plugin starts anew"


@pytest.mark.parametrize(
    "away",
    [
        named("a", A10, 4, taints=[taint("node.kubernetes.io/unschedulable")]),
        named("a", A10, 0, **{"nvidia.com/gpu.count": "4"}),
    ],
    ids=["cordoned", "no GPU is allocatable"],
)
def test_where_no_pod_can_land_now_nothing_is_free_and_the_gpus_are_there(away: Raw) -> None:
    [found] = stock([away], NOTHING, spec())
    assert (found.total, found.free) == (4, 0)


def test_only_nodes_are_counted_that_the_job_may_use() -> None:
    nodes = [named("a", A10, 4, pool="mine"), named("b", T4, 4, pool="others")]
    assert [s.product for s in stock(nodes, NOTHING, spec(runtime={"nodeSelector": {"pool": "mine"}}))] == [A10]


@pytest.mark.parametrize(
    ("pod_spec", "gpus"),
    [
        ({"containers": [container(1), container(2), {}]}, 3),
        ({"initContainers": [container(4)], "containers": [container(1)]}, 4),
        ({"initContainers": [container(1, restartPolicy="Always")], "containers": [container(1)]}, 2),
        ({"initContainers": [container(1, restartPolicy="Always"), container(3)], "containers": [container(2)]}, 4),
        ({"containers": [{"resources": {"requests": {"cpu": "1"}}}]}, 0),
    ],
)
def test_a_pods_gpus_are_those_that_the_scheduler_counts(pod_spec: Raw, gpus: int) -> None:
    assert gpus_of(pod_spec) == gpus


class Cluster:
    """An API server that lists nodes and pods, or refuses to."""

    def __init__(self, *pods: list[Raw] | ApiError) -> None:
        self._pods = list(pods)
        self.lists = 0

    async def list_all(
        self, path: str, label_selector: str = "", trim: Callable[[Raw], Raw] = dict, field_selector: str = ""
    ) -> tuple[list[Raw], int]:
        if path == NODES_PATH:
            return [trim(named("a", A10, 4)), trim(named("b", T4, 2))], 1
        assert (path, label_selector, field_selector) == ("/api/v1/pods", "", BOUND)
        self.lists += 1
        answer = self._pods.pop(0)
        if isinstance(answer, ApiError):
            raise answer
        return [trim(item) for item in answer], 1


def counter(cluster: Cluster, allowed: bool = True) -> FreeGpus:
    return FreeGpus(cluster, NodeGpus(cluster), allowed)  # type: ignore[arg-type]


async def test_pods_are_listed_once_a_minute_for_all_jobs_and_an_outage_keeps_what_was_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cluster = Cluster([pod("a", 1, 2), pod("elsewhere", 8)], refused(500), [])
    free = counter(cluster)
    expected = (kind(A10, 4, 1), kind(T4, 2, 2))
    assert await asyncio.gather(free.for_job(spec()), free.for_job(spec())) == [expected, expected]
    assert cluster.lists == 1
    monkeypatch.setattr("finetune_operator.free_gpus.FRESH_SECONDS", -1)
    assert await free.for_job(spec()) == expected
    assert await free.for_job(spec()) == (kind(A10, 4, 4), kind(T4, 2, 2))
    assert cluster.lists == 3


@pytest.mark.parametrize("allowed", [True, False])
async def test_without_the_right_to_list_pods_what_is_free_is_unknown(allowed: bool) -> None:
    cluster = Cluster(refused(403))
    free = counter(cluster, allowed)
    told = await free.for_job(spec())
    assert told == (kind(A10, 4, None), kind(T4, 2, None))
    assert free_words(told) == f"free: unknown of 4 {A10}, 2 {T4}"
    await free.for_job(spec())
    assert cluster.lists == int(allowed), "asked once a minute, not at every look"


def test_pods_of_a_node_are_added_up() -> None:
    assert asked_by_node([{"node": "a", "gpus": 1}, {"node": "b", "gpus": 2}, {"node": "a", "gpus": 3}]) == {
        "a": 4,
        "b": 2,
    }


# What is told


def looked(w: World, *kinds: GpuStock) -> Observation:
    return replace(w.observe(), stock=kinds)


def two_kinds(w: World) -> World:
    assert w.snapshot is not None
    gpus = [NodeGpu(product=p, nodes=1, per_node=8) for p in (A10, T4)]
    w.snapshot = replace(w.snapshot, snapshot=w.snapshot.snapshot.model_copy(update={"node_gpus": gpus}))
    return w


def prepared(report_gpus: int = 2, avoid: list[str] | None = None, **fields: object) -> World:
    """Prepare's plan stands in status, and the training Job exists."""
    w = world(**fields)
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(0, planned_success(report_gpus, avoid))
    w.settle()
    return two_kinds(w)


def told(decided: Plan) -> str:
    assert decided.status is not None
    assert decided.status.plan is not None
    return decided.status.plan.availability or ""


AUTO = {"compute": {"gpusPerNode": "Auto"}}


def test_a_plan_that_leaves_a_choice_tells_what_it_takes_and_what_is_free_of_the_kinds_that_fit() -> None:
    w = prepared(avoid=[T4], **AUTO)
    assert stock_wanted(w.observe())
    small, lone = kind("Small", 1, 1), kind("Large", 16, 3, nodes=2, most=8)
    decided = plan(looked(w, kind(A10, 4, 3), kind(T4, 8, 8), small, lone))
    assert told(decided) == (
        f"Takes 2 on 1 node. At 2026-03-01T12:00:00Z free: 3 of 4 {A10}, 3 of 16 Large (at most 3 on one node)."
    )
    w.apply(decided)
    assert w.status.plan is not None
    assert [s.product for s in w.status.plan.gpu_stock or []] == [A10, "Large"]
    assert not stock_wanted(w.observe()), "once is enough"
    w.tick(60)
    assert w.settle().idle
    assert w.status.plan.gpu_stock, "nobody looked again: it stays"


def test_what_is_free_changes_neither_the_plan_nor_what_the_training_pod_asks_for() -> None:
    w = world(**AUTO)
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(0, planned_success(2))
    two_kinds(w)
    none, all_free = (plan(looked(w, kind(A10, 8, free), kind(T4, 8, free))) for free in (0, 8))
    assert none.create_job is all_free.create_job is Stage.TRAIN
    assert none.allotment == all_free.allotment


def test_the_pods_are_not_listed_before_the_training_job_has_its_place_in_line() -> None:
    w = world(**AUTO)
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(0, planned_success(2))
    two_kinds(w)
    assert w.plan().create_job is Stage.TRAIN
    assert not stock_wanted(w.observe())


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, True),
        (AUTO, True),
        ({"queue": {"name": "team"}}, False),
        ({"compute": {"gpu": {"resourceName": "nvidia.com/mig-1g.5gb"}}}, False),
        ({"training": {"useCpu": True}, "compute": {"gpusPerNode": 0}}, False),
    ],
)
def test_what_is_free_is_looked_at_where_the_cluster_chooses(fields: dict[str, object], wanted: bool) -> None:
    assert stock_wanted(prepared(**fields).observe()) is wanted


def test_a_job_whose_only_kind_is_known_has_no_use_for_it_until_its_pod_finds_no_place() -> None:
    w = prepared()
    w.make_snapshot()  # nodes have one kind, or were not asked
    assert not stock_wanted(w.observe())
    w.start_pod()
    w.change_pod(node="gpu-7", bound_at=w.now)
    assert not stock_wanted(w.observe())
    w.change_pod(node="", bound_at=None, unschedulable="0/2 nodes are available", unschedulable_since=w.now)
    assert stock_wanted(w.observe())


def test_the_wait_for_a_place_says_what_is_free() -> None:
    w = prepared(compute={"gpusPerNode": 2})
    w.start_pod()
    w.change_pod(unschedulable="0/2 nodes are available: 2 Insufficient nvidia.com/gpu", unschedulable_since=w.now)

    def message(*kinds: GpuStock) -> str:
        decided = plan(looked(w, *kinds))
        assert decided.status is not None
        found = conditions.find(decided.status, ConditionType.WAITING)
        assert found is not None
        return found.message

    assert message(kind(A10, 8, 2, nodes=2, most=4)).startswith(
        "no node has room for 2 × nvidia.com/gpu: 0/2 nodes are available: 2 Insufficient nvidia.com/gpu. "
        f"GPUs when last looked at: free: 2 of 8 {A10} (at most 2 on one node). Since "
    )
    assert f"free: unknown of 4 {A10}." in message(kind(A10, 4, None))
    assert "no node has GPUs that it may use." in message()


def test_a_job_that_only_plans_tells_it_too() -> None:
    w = world(planOnly=True, **AUTO)
    w.settle()
    w.start_pod()
    w.run_pod()
    assert not stock_wanted(w.observe())
    w.end_pod(0, planned_success(2))
    two_kinds(w)
    assert stock_wanted(w.observe())
    assert told(plan(looked(w, kind(A10, 4, 4)))).endswith(f"free: 4 of 4 {A10}.")
