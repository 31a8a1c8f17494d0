"""A node loses its power while it trains: the job says so, waits until the pod surely is dead, and goes on elsewhere.

Needs a second node: ``NODES=2 make cluster-up`` and a few minutes for the images to be there too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from finetune_cluster.api import Api
from finetune_cluster.api import condition as node_condition
from finetune_cluster.instance import Instance, Node, require
from finetune_cluster.node import stop
from finetune_cluster.up import up
from tests.chaos.run import Lives, ended
from tests.e2e.conftest import Reference
from tests.e2e.stack import Space, Stack, condition

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
NODES = "/api/v1/nodes"
GRACE = 10
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"


@pytest.fixture
def second(stack: Stack) -> Iterator[tuple[Instance, Node]]:
    """The second node; back, and with the first open to pods, afterwards."""
    name = stack.target.cluster_name
    if name is None or len(require(name).nodes) < 2:
        pytest.skip("needs a local cluster with a second node: NODES=2 make cluster-up")
    instance = require(name)
    first, node = instance.nodes[:2]
    try:
        yield instance, node
    finally:
        stack.target.kubectl("taint", "node", node.name, f"{OUT_OF_SERVICE}-", "--overwrite")
        stack.target.kubectl("uncordon", first.name)
        up(name, len(instance.nodes))


def test_training_goes_on_on_another_node_after_its_own_is_gone(
    space: Space, undisturbed: Reference, second: tuple[Instance, Node]
) -> None:
    instance, node = second
    first, kubectl = instance.nodes[0], space.target.kubectl
    soon = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    spec = {
        **undisturbed.spec,
        # By default a pod stays for five minutes on a node that does not answer.
        "runtime": {"tolerations": [{**soon, "tolerationSeconds": 1}]},
    }
    spec["recovery"] = {**spec["recovery"], "terminationGracePeriodSeconds": GRACE}
    kubectl("cordon", first.name)
    with Lives(space) as lives, Api(instance.kubeconfig) as api:
        job = lives.begin("moved", spec)
        job.until_step(35)
        trained_on = {p["spec"]["nodeName"] for p in space.pods()}
        assert trained_on == {node.name}
        kubectl("uncordon", first.name)
        gone = time.monotonic()
        stop(instance, node)
        api.wait(NODES, node.name, lambda n: node_condition(n, "Ready") == "Unknown", 120, "the node is lost")
        told = job.until(lambda j: condition(j, "Waiting").get("reason") == "NodeLost", 200, "NodeLost is told")
        assert node.name in condition(told, "Waiting")["message"]
        assert [
            p["spec"]["nodeName"] for p in space.pods() if p["metadata"]["labels"]["finetune.dev/stage"] == "train"
        ] == [node.name]
        told_after = time.monotonic() - gone
        # What an operator of a cluster does who knows that the machine is off.
        kubectl("taint", "node", node.name, f"{OUT_OF_SERVICE}=nodeshutdown:NoExecute")
        result = ended(space, job.until_finished())
    print(f"NodeLost told after {told_after:.0f} s")  # noqa: T201
    assert result.files == undisturbed.ended.files
    lost, last = (a for a in result.job["status"]["attempts"] if a["stage"] == "train")
    assert (lost["node"], last["node"]) == (node.name, first.name)
    assert lost["reason"] == "NodeLost", lost
    assert result.result["resumedFromSteps"] == [last["resumedFromStep"]]
    assert last["resumedFromStep"] >= 20
