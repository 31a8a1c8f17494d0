"""A node loses its power while it trains: the job says so, waits until the pod surely is dead, and goes on elsewhere.

``make chaos`` runs it, on a cluster of its own: the second node that it adds stays, and takes minutes to get the images.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator

import pytest

from demo import images, install
from demo.target import NAMESPACE, SYSTEM_NAMESPACE
from finetune_cluster.api import Api
from finetune_cluster.api import condition as node_condition
from finetune_cluster.instance import Instance, Node
from finetune_cluster.node import stop
from finetune_cluster.up import up
from tests.chaos.logs import first_after
from tests.chaos.run import Lives, ended
from tests.e2e.conftest import Reference
from tests.e2e.stack import Space, Stack, condition

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]
NODES = "/api/v1/nodes"
GRACE = 10
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
WITH_SECOND_NODE = "WITH_SECOND_NODE"
"""Environment variable that lets this test add a node to the cluster."""
TOLD = re.compile(r"NodeLost told after (\d+) s, training again after (\d+) s")
"""What it prints: seconds from the power failure, and from the taint that says that the node is off."""


@pytest.fixture
def second(stack: Stack) -> Iterator[tuple[Instance, Node]]:
    """A second node, which joins when store and operator are on the first. Back, and the first open to pods, afterwards."""
    name = stack.target.cluster_name
    if name is None or not os.environ.get(WITH_SECOND_NODE):
        pytest.skip("adds a second node to the local cluster: run by `make chaos ONLY=node-lost`, on one of its own")
    instance = up(name, 2, gpu_product=install.GPU_PRODUCT)
    images.ensure(stack.target)
    first, node = instance.nodes[:2]
    for namespace in (NAMESPACE, SYSTEM_NAMESPACE):
        away = [p["metadata"]["name"] for p in stack.target.get("pods", "-n", namespace)["items"] if p["spec"]["nodeName"] != first.name]  # fmt: skip
        assert away == [], f"they would be lost with node {node.name}: start with a new cluster of one node"
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
        tainted = time.time()
        kubectl("taint", "node", node.name, f"{OUT_OF_SERVICE}=nodeshutdown:NoExecute")
        step = job.logs.until(
            lambda lines: first_after(lines, tainted, lambda x: x.step is not None), 300, "training elsewhere"
        )
        result = ended(space, job.until_finished())
    again_after = step.at - tainted
    print(f"NodeLost told after {told_after:.0f} s, training again after {again_after:.0f} s")  # noqa: T201
    assert result.files == undisturbed.ended.files
    lost, last = (a for a in result.job["status"]["attempts"] if a["stage"] == "train")
    assert (lost["node"], last["node"]) == (node.name, first.name)
    assert lost["reason"] == "NodeLost", lost
    assert result.result["resumedFromSteps"] == [last["resumedFromStep"]]
    assert last["resumedFromStep"] >= 20
