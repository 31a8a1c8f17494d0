"""Two operators, lost leaders, lost watches, a stalled queue."""

from __future__ import annotations

import ssl
import threading
import time

import httpx
import pytest

from finetune_api.names import Stage
from finetune_cluster.steps import Pod, Running, Step
from tests.operator.harness import Bench, OperatorProcess, is_true, stage_of, succeed_stage, until_set
from tests.operator.manifests import finetunejob
from tests.operator.poster import Poster
from tests.operator.test_progress import train_forever, training_pod

pytestmark = pytest.mark.light


def role(operator: OperatorProcess) -> str:
    return operator.get("/readyz").text


def until_leader(operator: OperatorProcess, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while role(operator) != "leader":
        assert time.monotonic() < end, operator.log.read_text()[-3000:]
        threading.Event().wait(0.1)


def test_of_two_operators_one_leads_and_the_other_takes_over_when_it_is_killed(bench: Bench) -> None:
    first = bench.start_operator(FINETUNE_LEADER_ELECTION="true")
    until_leader(first)
    second = bench.start_operator(FINETUNE_LEADER_ELECTION="true")
    assert role(second) == "standby"
    assert second.get("/healthz").status_code == 200
    go = threading.Event()

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is Stage.PREPARE:
            return [Running(), until_set(go), *succeed_stage(pod)[1:]]
        return succeed_stage(pod)

    with bench.script(script):
        bench.apply(finetunejob("ha").build())
        bench.until_phase("ha", "Preparing")
        first.kill()
        go.set()
        assert is_true(bench.until_finished("ha", 90), "Complete")
    assert role(second) == "leader"


def test_an_operator_that_is_stopped_hands_its_lease_over_at_once(bench: Bench) -> None:
    first = bench.start_operator(FINETUNE_LEADER_ELECTION="true")
    until_leader(first)
    second = bench.start_operator(FINETUNE_LEADER_ELECTION="true")
    path = f"/apis/coordination.k8s.io/v1/namespaces/{bench.namespace}/leases/finetune-operator"
    held_by = bench.api.get(path)["spec"]["holderIdentity"]
    assert first.stop() == 0
    assert bench.api.get(path)["spec"].get("holderIdentity") != held_by, "it need not expire first"
    until_leader(second)


def test_a_leader_that_loses_its_lease_exits(bench: Bench) -> None:
    leader = bench.start_operator(FINETUNE_LEADER_ELECTION="true")
    until_leader(leader)
    path = f"/apis/coordination.k8s.io/v1/namespaces/{bench.namespace}/leases/finetune-operator"
    for _ in range(3):
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", time.gmtime())
        bench.api.merge(path, {"spec": {"holderIdentity": "thief", "renewTime": now, "acquireTime": now}})
    assert leader.process.wait(60) == 1


def test_a_standby_takes_progress_posts_too(bench: Bench) -> None:
    first = bench.start_operator(FINETUNE_LEADER_ELECTION="true")
    until_leader(first)
    second = bench.start_operator(FINETUNE_LEADER_ELECTION="true", FINETUNE_PROGRESS_INTERVAL_SECONDS="1")
    with bench.script(train_forever):
        bench.apply(finetunejob("any").build())
        poster = Poster(bench, second, training_pod(bench, "any"), "any")
        assert poster.post(step=1, totalSteps=2).status_code == 200
        bench.until("any", lambda j: j["status"].get("progress", {}).get("summary") == "1/2", "progress")


def test_what_happened_while_no_operator_ran_is_made_good(bench: Bench) -> None:
    first = bench.start_operator()
    with bench.script(train_forever):
        bench.apply(finetunejob("gone").build())
        bench.apply(finetunejob("stay").build())
        bench.until_phase("stay", "Training")
        first.kill()
        bench.api.delete(f"/apis/finetune.dev/v1alpha1/namespaces/{bench.namespace}/finetunejobs/gone")
        bench.merge("stay", {"suspend": True})
        bench.start_operator()
        bench.until_phase("stay", "Suspended")


def test_the_operator_survives_an_api_server_that_restarts(bench: Bench) -> None:
    operator = bench.start_operator()
    with bench.script():
        bench.apply(finetunejob("before").build())
        bench.until_finished("before")
        bench.cluster.kill("kube-apiserver")
        bench.cluster.start("kube-apiserver")
        bench.cluster.wait_ready()
        bench.apply(finetunejob("after").build())
        assert is_true(bench.until_finished("after", 90), "Complete")
    assert operator.process.poll() is None
    assert operator.get("/healthz").status_code == 200


def until_healthz(operator: OperatorProcess, code: int, seconds: float = 60) -> str:
    end = time.monotonic() + seconds
    while (answer := operator.get("/healthz")).status_code != code:
        assert time.monotonic() < end, operator.log.read_text()[-3000:]
        threading.Event().wait(0.2)
    return answer.text


def test_liveness_fails_while_work_stands_still_and_holds_again_afterwards(bench: Bench) -> None:
    operator = bench.start_operator(FINETUNE_STALL_SECONDS="3")
    bench.apply(finetunejob("stuck").set(runtime={"serviceAccountName": "nobody"}).build())
    bench.until_phase("stuck", "Preparing")  # no pod can come: after ten seconds the operator asks for the reason
    bench.cluster.freeze("kube-apiserver")
    try:
        assert "the work queue has stood still" in until_healthz(operator, 503)
    finally:
        bench.cluster.thaw("kube-apiserver")
        bench.cluster.wait_ready()
    assert until_healthz(operator, 200) == "ok"


def test_metrics_and_probes_are_served(bench: Bench) -> None:
    operator = bench.start_operator()
    with bench.script():
        bench.apply(finetunejob("seen").build())
        bench.until_finished("seen")
        bench.told("seen", "Succeeded")  # its Event comes after the operator has heard the answer to its own write
    text = operator.get("/metrics", operator.metrics_port).text
    assert 'finetune_jobs{phase="Succeeded"} 1.0' in text
    assert 'finetune_api_writes_total{resource="jobs",verb="post"} 3.0' in text
    assert 'finetune_stage_duration_seconds_count{outcome="succeeded",stage="train"} 1.0' in text
    assert 'finetune_jobs_finished_total{outcome="succeeded",reason="Succeeded"} 1.0' in text
    assert "finetune_leader 1.0" in text
    context = ssl.create_default_context(cafile=str(bench.tls.ca))
    url = f"https://localhost:{operator.progress_port}/v1/namespaces/x/finetunejobs/y/progress"
    answer = httpx.post(url, json={}, verify=context, trust_env=False)
    assert (answer.status_code, answer.json()["reason"]) == (401, "Unauthorized")
