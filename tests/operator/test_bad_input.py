"""What cannot work says so: the reason, the advice, and that no GPU was asked for (watched from before apply)."""

from __future__ import annotations

import threading

import pytest

from finetune_api.failures import FAILURES, Consequence, Reason
from finetune_api.names import Stage
from finetune_cluster.steps import (
    OOM_KILLED,
    Evicted,
    Pod,
    Running,
    Step,
    Terminated,
    Unschedulable,
    Waiting,
)
from tests.operator.harness import (
    Bench,
    Recorder,
    condition,
    gpu_pods,
    is_true,
    jobs_of,
    pods_of,
    stage_of,
    succeed_stage,
    until_set,
)
from tests.operator.manifests import failure, finetunejob, termination_message

pytestmark = pytest.mark.light

PERMANENT = [f for f in FAILURES.values() if f.consequence is Consequence.FAIL and f.exit_code is not None]


def test_every_permanent_failure_of_prepare_ends_the_job_with_its_reason_and_advice(bench: Bench) -> None:
    bench.start_operator()
    by_name = {f"bad-{f.exit_code}": f for f in PERMANENT}

    def script(pod: Pod) -> list[Step]:
        found = by_name[pod["metadata"]["labels"]["finetune.dev/job-name"]]
        report = failure(Stage.PREPARE, found.reason, "train.jsonl:17 is not as it should be")
        # Every other one loses its termination message: the exit code says it too.
        text = termination_message(report) if (found.exit_code or 0) % 2 else ""
        return [Running(), Terminated(found.exit_code or 1, text)]

    recorder = Recorder(bench.cluster, pods_of(bench.namespace))
    with bench.script(script):
        for name in by_name:
            bench.apply(finetunejob(name).build())
        for name, row in by_name.items():
            failed = bench.until_finished(name)
            message = condition(failed, "Failed")["message"]
            assert condition(failed, "Failed")["reason"] == row.reason
            assert message.startswith(f"{row.reason}: ")
            assert message.endswith(f"{row.advice} No GPU was used.")
            if (row.exit_code or 0) % 2:
                assert "train.jsonl:17" in message
            assert failed["status"]["phase"] == "Failed"
    assert not gpu_pods(recorder.stop())


def test_a_failure_that_may_pass_is_repeated_and_then_told(bench: Bench) -> None:
    bench.start_operator()
    with bench.script(lambda _: [Running(), OOM_KILLED]):
        bench.apply(finetunejob("big").max_failures(0).build())
        failed = bench.until_finished("big")
    message = condition(failed, "Failed")["message"]
    assert condition(failed, "Failed")["reason"] == "HostOutOfMemory"
    assert "raise cpuStages.limits.memory in the operator's chart" in message


def test_a_drained_pod_is_replaced_and_counts_for_nothing(bench: Bench) -> None:
    bench.start_operator()
    runs: list[str] = []

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is Stage.TRAIN:
            runs.append(pod["metadata"]["name"])
            if len(runs) == 1:
                return [Running(), Evicted("EvictionByEvictionAPI", "drained", 143)]
        return succeed_stage(pod)

    with bench.script(script):
        bench.apply(finetunejob("drain").max_failures(0).build())
        done = bench.until_finished("drain", 60)
    assert is_true(done, "Complete")
    assert len(runs) == 2
    assert [a["outcome"] for a in done["status"]["attempts"] if a["stage"] == "train"] == ["Failed", "Succeeded"]


def test_a_missing_image_is_waited_for_and_heals(bench: Bench) -> None:
    bench.start_operator()
    pushed = threading.Event()

    def script(pod: Pod) -> list[Step]:
        if stage_of(pod) is Stage.PREPARE:
            message = 'Back-off pulling image "127.0.0.1:9/none:1": connection refused'
            return [Waiting("ImagePullBackOff", message), until_set(pushed), *succeed_stage(pod)]
        return succeed_stage(pod)

    pods = Recorder(bench.cluster, pods_of(bench.namespace))
    with bench.script(script):
        bench.apply(finetunejob("pull").build())
        waiting = bench.until_waiting("pull", "ImageUnavailable")
        assert "127.0.0.1:9/none:1" in condition(waiting, "Waiting")["message"]
        assert FAILURES[Reason.IMAGE_UNAVAILABLE].advice in condition(waiting, "Waiting")["message"]
        assert waiting["status"]["waitingSince"]
        assert not gpu_pods(pods.so_far()), "the image is known to be there before a GPU is asked for"
        pushed.set()
        done = bench.until_finished("pull")
    assert len(gpu_pods(pods.stop())) == 1
    assert is_true(done, "Complete")
    assert condition(done, "Waiting")["status"] == "False"
    told = bench.told("pull", "Waiting")
    assert condition(waiting, "Waiting")["message"] in [m.partition(": ")[2] for r, m in told if r == "Waiting"]


def test_a_gpu_that_never_comes_says_what_is_pending_and_ends_at_the_timeout(bench: Bench) -> None:
    bench.start_operator()

    def script(pod: Pod) -> list[Step]:
        return [Unschedulable()] if stage_of(pod) is Stage.TRAIN else succeed_stage(pod)

    with bench.script(script, gpus_per_node=0):
        bench.apply(finetunejob("gpu").pending_timeout(4).build())
        waiting = bench.until_waiting("gpu", "Unschedulable")
        message = condition(waiting, "Waiting")["message"]
        assert "1 × nvidia.com/gpu" in message
        assert "Insufficient nvidia.com/gpu" in message
        assert "Since 20" in message
        failed = bench.until_finished("gpu")
        message = condition(failed, "Failed")["message"]
        assert condition(failed, "Failed")["reason"] == "PendingTimeout"
        assert "Unschedulable" in message
        assert FAILURES[Reason.UNSCHEDULABLE].advice in message
        assert message.endswith("No GPU was used.")
        uid = failed["metadata"]["uid"]
        selector = {"labelSelector": f"finetune.dev/job-uid={uid},finetune.dev/stage=train"}
        bench.until_gone(jobs_of(bench.namespace), query=selector)


def test_a_quota_that_refuses_is_waited_for_and_heals(bench: Bench) -> None:
    path = f"/api/v1/namespaces/{bench.namespace}/resourcequotas"
    bench.api.create(path, {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}})
    bench.api.wait(path, "none", lambda q: "hard" in (q.get("status") or {}), 20, "the quota is counted")
    bench.start_operator()
    with bench.script():
        bench.apply(finetunejob("quota").build())
        waiting = bench.until_waiting("quota", "AdmissionRefused")
        assert "exceeded quota" in condition(waiting, "Waiting")["message"]
        assert waiting["status"]["phase"] == "Pending"
        bench.api.delete(f"{path}/none")
        assert is_true(bench.until_finished("quota"), "Complete")


def test_a_quota_that_refuses_only_the_pods_is_waited_for_in_the_quotas_words_and_heals(bench: Bench) -> None:
    path = f"/api/v1/namespaces/{bench.namespace}/resourcequotas"
    bench.api.create(path, {"metadata": {"name": "gpus"}, "spec": {"hard": {"requests.nvidia.com/gpu": "0"}}})
    bench.api.wait(path, "gpus", lambda q: "hard" in (q.get("status") or {}), 20, "the quota is counted")
    bench.start_operator()
    with bench.script():
        bench.apply(finetunejob("quota").build())
        waiting = bench.until_waiting("quota", "AdmissionRefused")
        message = condition(waiting, "Waiting")["message"]
        assert "the train pod cannot be created: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1" in message
        assert FAILURES[Reason.ADMISSION_REFUSED].advice in message
        assert waiting["status"]["phase"] == "Queued"
        bench.api.delete(f"{path}/gpus")
        assert is_true(bench.until_finished("quota", 90), "Complete")


def test_a_webhook_that_is_down_is_told_and_heals(bench: Bench) -> None:
    path = "/apis/admissionregistration.k8s.io/v1/validatingwebhookconfigurations"
    name = f"down-{bench.namespace}"
    webhook = {
        "name": "down.example.com",
        "clientConfig": {"url": "https://127.0.0.1:9/"},
        "rules": [{"apiGroups": ["batch"], "apiVersions": ["v1"], "resources": ["jobs"], "operations": ["CREATE"]}],
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": bench.namespace}},
        "sideEffects": "None",
        "admissionReviewVersions": ["v1"],
    }
    bench.api.create(path, {"metadata": {"name": name}, "webhooks": [webhook]})
    bench.start_operator()
    with bench.script():
        bench.apply(finetunejob("hook").build())
        waiting = bench.until_waiting("hook", "AdmissionRefused")
        assert "the API server answered 500" in condition(waiting, "Waiting")["message"]
        assert "down.example.com" in condition(waiting, "Waiting")["message"]
        bench.api.delete(f"{path}/{name}")
        assert is_true(bench.until_finished("hook", 90), "Complete")


def test_a_spec_that_makes_no_valid_job_fails_at_once_in_the_servers_words(bench: Bench) -> None:
    bench.start_operator()
    toleration = {"key": "gpu", "operator": "Exists", "effect": "NoSchedule", "tolerationSeconds": 5}
    with bench.script():
        bench.apply(finetunejob("odd").set(runtime={"tolerations": [toleration]}).build())
        failed = bench.until_finished("odd")
    message = condition(failed, "Failed")["message"]
    assert condition(failed, "Failed")["reason"] == "InvalidConfig"
    assert "effect must be 'NoExecute' when `tolerationSeconds` is set" in message
    assert message.endswith("No GPU was used.")


def test_a_service_account_that_is_missing_is_named_until_the_timeout(bench: Bench) -> None:
    bench.start_operator()
    with bench.script():
        bench.apply(finetunejob("account").set(runtime={"serviceAccountName": "nobody"}).pending_timeout(12).build())
        failed = bench.until_finished("account")
    assert condition(failed, "Failed")["reason"] == "PendingTimeout"
    assert 'serviceaccount "nobody" not found' in condition(failed, "Failed")["message"]


def test_a_namespace_that_enforces_restricted_pods_takes_every_stage(bench: Bench) -> None:
    label = "pod-security.kubernetes.io/enforce"
    bench.api.merge(f"/api/v1/namespaces/{bench.namespace}", {"metadata": {"labels": {label: "restricted"}}})
    bench.start_operator()
    with bench.script():
        bench.apply(finetunejob("strict").build())
        assert is_true(bench.until_finished("strict"), "Complete")


def test_a_claim_that_is_missing_is_named(bench: Bench) -> None:
    bench.start_operator()
    words = 'persistentvolumeclaim "models" not found'
    with bench.script(lambda _: [Unschedulable(words)], gpus_per_node=0):
        bench.apply(finetunejob("claim").set(model={"uri": "pvc://models/smol"}).build())
        waiting = bench.until_waiting("claim", "VolumeUnavailable")
        assert words in condition(waiting, "Waiting")["message"]
        [job] = bench.stage_jobs()
        volumes = job["spec"]["template"]["spec"]["volumes"]
        assert {"claimName": "models", "readOnly": True} in [v.get("persistentVolumeClaim") for v in volumes]
