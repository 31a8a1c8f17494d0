"""up and down, from and into any state, beside another cluster that keeps running."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import httpx
import pytest

from finetune_cluster.api import Api, condition
from finetune_cluster.console import ClusterError
from finetune_cluster.containerd import ctr
from finetune_cluster.down import REMOVING, down, half_removed
from finetune_cluster.instance import Instance, load, load_or_create
from finetune_cluster.network import ensure_bridge
from finetune_cluster.node import sandbox_image, stop
from finetune_cluster.paths import module_root
from finetune_cluster.processes import node_inits, programs
from finetune_cluster.status import cluster_status
from finetune_cluster.up import NODES, healthy, up
from tests.cluster.objects import EVENTS, JOBS, PODS, container, job, pod, termination
from tests.cluster.traces import processes_of, traces

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def start_up(name: str) -> subprocess.Popen[bytes]:
    """`up` in a process of its own, that can be killed."""
    command = [sys.executable, "-m", "finetune_cluster", "up", "--name", name, "--gpus-per-node", "1"]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(module_root())}, stderr=subprocess.DEVNULL)


def call(*arguments: str) -> None:
    """The driver's command line."""
    command = [sys.executable, "-m", "finetune_cluster", *arguments]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(module_root())}, stderr=subprocess.DEVNULL)


def assert_works(instance: Instance, image: str) -> None:
    assert healthy(instance)
    with Api(instance.kubeconfig) as api:
        name = f"works-{time.monotonic_ns()}"
        api.create(JOBS, job(name, container(image, "reach", "kubernetes.default.svc:443", "20"), backoff_limit=0))
        try:
            ended = api.wait(
                JOBS, name, lambda j: bool(condition(j, "Complete") or condition(j, "Failed")), 60, "job has ended"
            )
        except ClusterError as error:
            raise AssertionError(f"{error}\n{account(api, name)}") from error
        assert condition(ended, "Complete") == "True", "a pod reaches the API server by its service's name"


def account(api: Api, job_name: str) -> str:
    """What happened to a Job's pods."""
    pods = [p for p in api.get(PODS)["items"] if p["metadata"]["name"].startswith(job_name)]
    events = [e for e in api.get(EVENTS)["items"] if e["involvedObject"]["name"].startswith(job_name)]
    told = [f"{e['reason']} × {e.get('count', 1)}: {e['message']}" for e in events]
    return "\n".join([*(json.dumps(p["status"], indent=1) for p in pods), *told])


def test_up_again_changes_nothing(cluster: Instance) -> None:
    before = node_inits(cluster)
    call("up", "--name", cluster.name)
    assert node_inits(cluster) == before
    call("status", "--name", cluster.name)  # exit code 0: healthy


def test_up_repairs_what_died(cluster: Instance, image: str) -> None:
    [init] = node_inits(cluster).values()
    for process in programs(init):  # PID 1 starts each again
        os.kill(process.pid, signal.SIGKILL)
    assert_works(up(cluster.name, 1, 2), image)
    stop(cluster, cluster.nodes[0])
    assert not healthy(cluster)
    assert_works(up(cluster.name, 1, 2), image)


def test_up_works_after_it_was_killed_at_any_moment(cluster: Instance, second: str, image: str) -> None:
    generator = random.Random(0)
    for moment in sorted(generator.uniform(0.2, 7) for _ in range(5)):
        process = start_up(second)
        try:
            process.wait(moment)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    assert_works(up(second, 1, 1), image)
    assert healthy(cluster)


def test_up_repairs_a_node_without_the_image_that_every_pod_needs(second: str, image: str) -> None:
    instance = up(second, 1, 1)
    [init] = node_inits(instance).values()
    ctr(init, "images", "remove", "--sync", sandbox_image(instance, instance.nodes[0]))
    assert not healthy(instance)
    assert not cluster_status(instance).healthy
    assert_works(up(second, 1, 1), image)


def test_two_at_once_do_not_disturb_each_other(second: str, image: str) -> None:
    processes = [start_up(second), start_up(second)]
    assert [process.wait(120) for process in processes] == [0, 0]
    instance = load(second)
    assert instance
    assert_works(instance, image)


def test_down_leaves_nothing_behind(cluster: Instance, second: str, image: str) -> None:
    before = traces(second)
    instance = up(second, 2, 1)
    assert_works(instance, image)
    during = traces(second)
    assert processes_of(instance)
    assert all(during[kind] - before[kind] for kind in ("devices and addresses", "routes", "cgroups")), (
        "the test sees what there is"
    )
    down(second)
    after = traces(second)
    assert {kind: after[kind] - before[kind] for kind in before} == {kind: set() for kind in before}
    assert {kind: before[kind] - after[kind] for kind in before} == {kind: set() for kind in before}
    assert processes_of(instance) == set()
    assert not instance.state.exists()
    assert healthy(cluster)


@pytest.mark.parametrize("moment", [0.3, 1.2, 2.5])
def test_down_leaves_nothing_of_a_half_built_cluster(cluster: Instance, second: str, moment: float) -> None:
    before = traces(second)
    process = start_up(second)
    try:
        process.wait(moment)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    instance = load(second)
    down(second)
    after = traces(second)
    assert {kind: after[kind] - before[kind] for kind in before} == {kind: set() for kind in before}
    assert instance is None or processes_of(instance) == set()


def test_up_finishes_a_removal_that_was_killed_and_starts_anew(second: str, image: str) -> None:
    instance = up(second, 1, 1)
    stop(instance, instance.nodes[0])
    (instance.state / REMOVING).touch()
    shutil.rmtree(instance.pki)
    assert_works(up(second, 1, 1), image)
    assert not half_removed(instance)


def test_down_of_a_cluster_that_is_not_there_is_fine(second: str) -> None:
    assert not down(second)
    ensure_bridge(load_or_create(second))
    assert down(second)


def test_pods_of_two_nodes_reach_each_other(second: str, image: str) -> None:
    instance = up(second, 2, 1)
    serving, asking = (node.name for node in instance.nodes)
    with Api(instance.kubeconfig) as api:
        api.create(PODS, pod("serves", container(image, "serve", ":8080", "hello"), nodeName=serving))
        address = api.wait(PODS, "serves", lambda p: condition(p, "Ready") == "True", 40, "server runs")["status"][
            "podIP"
        ]
        asks = container(image, "get", f"http://{address.replace('.', '-')}.default.pod.cluster.local:8080", "20")
        api.create(PODS, pod("asks", asks, nodeName=asking))
        ended = api.wait(PODS, "asks", lambda p: bool(termination(p)), 40, "client has ended")
        assert termination(ended)["exitCode"] == 0


def test_a_silenced_kubelet_makes_its_node_not_ready_while_its_pods_run_on(second: str, image: str) -> None:
    instance = up(second, 2, 1)
    silent = instance.nodes[1].name
    with Api(instance.kubeconfig) as api:
        api.create(PODS, pod("serves", container(image, "serve", ":8080", "hello"), nodeName=silent))
        address = api.wait(PODS, "serves", lambda p: condition(p, "Ready") == "True", 40, "server runs")["status"][
            "podIP"
        ]
        call("kill-node", silent, "--kubelet", "--name", second)
        api.wait(NODES, silent, lambda n: condition(n, "Ready") == "Unknown", 90, "node is not Ready")
        assert httpx.get(f"http://{address}:8080", trust_env=False).text == "hello"
        call("start-node", silent, "--name", second)
        api.wait(NODES, silent, lambda n: condition(n, "Ready") == "True", 60, "node is Ready")


def test_a_lost_node_becomes_not_ready_and_comes_back(second: str, image: str) -> None:
    instance = up(second, 2, 1)
    lost = instance.nodes[1]
    with Api(instance.kubeconfig) as api:
        stop(instance, lost)
        gone = api.wait(NODES, lost.name, lambda n: condition(n, "Ready") != "True", 90, "the lost node is not Ready")
        assert condition(gone, "Ready") == "Unknown"
        assert not cluster_status(instance).healthy
        assert_works(up(second, 2, 1), image)
        assert condition(api.get(f"{NODES}/{lost.name}"), "Ready") == "True"


def test_a_node_can_be_added_and_gpus_changed_while_pods_run(second: str) -> None:
    one = up(second, 1, 1)
    before = node_inits(one)
    two = up(second, 2, 3)
    assert node_inits(two).items() > before.items(), "the first node was not restarted"
    assert [node.gpus for node in cluster_status(two).nodes] == ["3", "3"]
