"""What the Jobs of the stages ask for."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FAILURES, INTERRUPTED_EXIT_CODES, Consequence, Failure
from finetune_api.names import (
    ANNOTATION_MEMORY,
    CACHE_MOUNT,
    ENV_GRACE_SECONDS,
    ENV_LEADER,
    LABEL_UID,
    MAX_JOB_NAME,
    PIPELINE,
    PVC_MOUNT,
    Stage,
    stage_job_name,
)
from finetune_api.spec import MOST_NODES
from finetune_operator.manifests import Owner, stage_job, train_service
from finetune_operator.planning.model import Allotment
from finetune_operator.settings import Settings
from tests.operator.world import UID, world

Raw = dict[str, Any]


def job_of(stage: Stage, memory: str | None = None, **spec: object) -> Raw:
    w = world(**spec)
    w.make_snapshot()
    assert w.snapshot is not None
    return stage_job(Owner("ns", "story", UID), w.snapshot, stage, Settings(), Allotment(memory))


def pod_spec(stage: Stage, **spec: object) -> Raw:
    return dict(job_of(stage, **spec)["spec"]["template"]["spec"])


def test_a_runtime_class_is_the_training_pods_alone() -> None:
    asked = {"runtimeClassName": "nvidia"}
    assert pod_spec(Stage.TRAIN, runtime=asked)["runtimeClassName"] == "nvidia"
    assert "runtimeClassName" not in pod_spec(Stage.PREPARE, runtime=asked)
    assert "runtimeClassName" not in pod_spec(Stage.PUBLISH, runtime=asked)
    assert "runtimeClassName" not in pod_spec(Stage.TRAIN)


@pytest.mark.parametrize("stage", list(Stage))
def test_no_pod_has_access_to_the_api(stage: Stage) -> None:
    """Ranks find each other by the Service's name and their index, progress is posted with a token for that alone."""
    pod = pod_spec(stage)
    assert pod["automountServiceAccountToken"] is False
    assert "serviceAccountName" not in pod


def test_only_the_training_pod_asks_for_a_gpu_and_for_where_to_find_it() -> None:
    asked = {"nodeSelector": {"pool": "gpu"}, "tolerations": [{"key": "gpu", "operator": "Exists"}]}
    train = pod_spec(Stage.TRAIN, runtime=asked)
    assert train["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert train["nodeSelector"] == {"pool": "gpu"}
    for stage in (Stage.PREPARE, Stage.PUBLISH):
        pod = pod_spec(stage, runtime=asked)
        assert "nvidia.com/gpu" not in str(pod["containers"])
        assert "nodeSelector" not in pod
        assert "tolerations" not in pod


@pytest.mark.parametrize("stage", PIPELINE)
def test_the_container_is_named_after_its_stage_as_failure_policy_and_status_expect(stage: Stage) -> None:
    assert [c["name"] for c in pod_spec(stage)["containers"]] == [stage.value]


def action(stage: Stage, code: int) -> str:
    """What the Job controller does about an exit code: the first rule that names it."""
    for rule in job_of(stage)["spec"]["podFailurePolicy"]["rules"]:
        if code in rule.get("onExitCodes", {}).get("values", ()):
            return str(rule["action"])
    return "Count"


@pytest.mark.parametrize("stage", PIPELINE)
@pytest.mark.parametrize("failure", [f for f in FAILURES.values() if f.exit_code], ids=lambda f: f.reason)
def test_a_failures_exit_code_makes_the_job_do_what_its_class_says(stage: Stage, failure: Failure) -> None:
    wanted = {
        Consequence.FAIL: "FailJob",
        Consequence.RETRY: "Count",
        Consequence.WAIT: "FailJob" if stage is Stage.TRAIN else "Count",
        Consequence.REPLACE: "Ignore",
    }
    assert failure.exit_code is not None
    assert action(stage, failure.exit_code) == wanted[failure.consequence]


@pytest.mark.parametrize("code", INTERRUPTED_EXIT_CODES)
def test_a_signal_from_outside_does_not_count(code: int) -> None:
    assert action(Stage.TRAIN, code) == "Ignore"


def test_a_disruption_is_looked_at_before_any_exit_code() -> None:
    assert "onPodConditions" in job_of(Stage.TRAIN)["spec"]["podFailurePolicy"]["rules"][0]


def test_only_the_training_pod_gets_the_specs_grace_period_and_every_container_knows_its_own() -> None:
    recovery = {"terminationGracePeriodSeconds": 300}
    for stage, seconds in ((Stage.PREPARE, 120), (Stage.TRAIN, 300), (Stage.PUBLISH, 120)):
        pod = pod_spec(stage, recovery=recovery)
        assert pod["terminationGracePeriodSeconds"] == seconds
        assert {"name": ENV_GRACE_SECONDS, "value": str(seconds)} in pod["containers"][0]["env"]


def test_grown_memory_is_the_training_pods_and_stands_on_its_job() -> None:
    job = job_of(Stage.TRAIN, "6Gi", compute={"memory": "4Gi"})
    assert job["metadata"]["annotations"][ANNOTATION_MEMORY] == "6Gi"
    assert job["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"] == "6Gi"
    assert "6Gi" not in str(job_of(Stage.PUBLISH, "6Gi", compute={"memory": "4Gi"}))


def test_several_training_pods_are_one_indexed_job_and_find_the_first_by_name() -> None:
    several = {"compute": {"nodes": 3, "gpusPerNode": 8}}
    train = job_of(Stage.TRAIN, **several)["spec"]
    assert (train["completionMode"], train["completions"], train["parallelism"]) == ("Indexed", 3, 3)
    assert train["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    service = train_service(Owner("ns", "story", UID))
    name = service["metadata"]["name"]
    pod = train["template"]
    assert pod["spec"]["subdomain"] == name
    [leader] = [e["value"] for e in pod["spec"]["containers"][0]["env"] if e["name"] == ENV_LEADER]
    job_name = job_of(Stage.TRAIN, **several)["metadata"]["name"]
    assert leader == f"{job_name}-0.{name}:{service['spec']['ports'][0]['port']}"
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["metadata"]["ownerReferences"][0]["uid"] == UID == service["spec"]["selector"][LABEL_UID]
    for stage in (Stage.PREPARE, Stage.PUBLISH):
        other = job_of(stage, **several)["spec"]
        assert (other["completions"], "completionMode" in other, "subdomain" in other["template"]["spec"]) == (
            1,
            False,
            False,
        )


def test_training_processes_get_shared_memory_of_their_own_and_a_log_that_says_why_a_collective_failed() -> None:
    """A container's own /dev/shm has 64 MiB."""
    pod = pod_spec(Stage.TRAIN, runtime={"env": [{"name": "NCCL_SOCKET_IFNAME", "value": "eth0"}]})
    [mount] = [m for m in pod["containers"][0]["volumeMounts"] if m["mountPath"] == "/dev/shm"]
    assert {"name": mount["name"], "emptyDir": {"medium": "Memory"}} in pod["volumes"]
    env = pod["containers"][0]["env"]
    assert {"name": "NCCL_DEBUG", "value": "WARN"} in env
    assert {"name": "NCCL_SOCKET_IFNAME", "value": "eth0"} in env
    louder = pod_spec(Stage.TRAIN, runtime={"env": [{"name": "NCCL_DEBUG", "value": "INFO"}]})["containers"][0]["env"]
    assert [e["value"] for e in louder if e["name"] == "NCCL_DEBUG"] == ["INFO"]
    assert "NCCL_DEBUG" not in str(pod_spec(Stage.PREPARE))


def test_the_last_training_pods_hostname_is_short_enough() -> None:
    assert len(f"{stage_job_name('a' * MAX_JOB_NAME, UID, Stage.TRAIN)}-{MOST_NODES - 1}") <= 63


def test_secrets_and_claims_of_prompts_are_mounted_where_prompts_are_read() -> None:
    sources = [
        {"uri": "s3://bucket/p.jsonl", "secretRef": {"name": "theirs"}},
        {"uri": "pvc://prompts/p.jsonl"},
        {"uri": "https://example.com/p.jsonl"},
    ]
    asked = {"evaluation": {"generation": {"sources": sources}}}
    pod = pod_spec(Stage.PREPARE, **asked)
    mounts = {m["mountPath"]: m for m in pod["containers"][0]["volumeMounts"]}
    volumes = {v["name"]: v for v in pod["volumes"]}
    mounted = mounts["/etc/finetune/secrets/prompts-0"]
    assert mounted["readOnly"]
    assert volumes[mounted["name"]]["secret"]["secretName"] == "theirs"
    assert volumes[mounted["name"]]["secret"]["optional"]
    claim = volumes[mounts[f"{PVC_MOUNT}/prompts"]["name"]]["persistentVolumeClaim"]
    assert claim == {"claimName": "prompts", "readOnly": True}
    assert "/etc/finetune/secrets/prompts-1" not in mounts
    for stage in (Stage.TRAIN, Stage.PUBLISH):
        assert "prompts" not in str(pod_spec(stage, **asked)["volumes"])


def test_tasks_run_in_the_image_that_has_lm_eval_and_their_secrets_are_mounted_where_data_are_fetched() -> None:
    own = {"name": "ours", "uri": "s3://bucket/tasks/", "secretRef": {"name": "theirs"}}
    asked = {"evaluation": {"tasks": [{"name": "arc_easy"}, own]}}
    train = pod_spec(Stage.TRAIN)["containers"][0]["image"]
    for stage in PIPELINE:
        pod = pod_spec(stage, **asked)
        assert pod["containers"][0]["image"] == train
        assert ("theirs" in str(pod["volumes"])) is (stage is Stage.PREPARE)
    assert pod_spec(Stage.PREPARE)["containers"][0]["image"] != train


def test_the_judges_secret_is_mounted_in_the_stage_that_asks_it_alone() -> None:
    judge = {"endpointURL": "https://api.example.com/v1", "model": "m", "secretRef": {"name": "openai"}}

    def judges_secret(stage: Stage, **told: object) -> str | None:
        pod = pod_spec(stage, evaluation={"judge": {**judge, **told}})
        mounts = {m["mountPath"]: m["name"] for m in pod["containers"][0]["volumeMounts"]}
        volumes = {v["name"]: v for v in pod["volumes"]}
        name = mounts.get("/etc/finetune/secrets/judge")
        return volumes[name]["secret"]["secretName"] if name is not None else None

    assert [judges_secret(stage) for stage in PIPELINE] == [None, None, "openai"]
    assert judges_secret(Stage.PUBLISH, secretRef=None) is None


def test_pods_that_train_together_are_near_each_other_where_there_is_room() -> None:
    asked = {"compute": {"nodes": 2}}
    affinity = pod_spec(Stage.TRAIN, **asked)["affinity"]
    terms = affinity["podAffinity"]["preferredDuringSchedulingIgnoredDuringExecution"]
    keys = [term["podAffinityTerm"]["topologyKey"] for term in sorted(terms, key=lambda term: -term["weight"])]
    assert keys == ["kubernetes.io/hostname", "topology.kubernetes.io/zone"]
    assert "nodeAffinity" not in affinity


def test_a_model_cache_is_writable_for_the_stages_that_read_the_base() -> None:
    cache = {"model": {"uri": "s3://models/smol", "cache": {"claimName": "models"}}}
    merged = {"output": {"uri": "s3://results/here", "merged": {"enabled": True}}}

    def mounted(stage: Stage, **spec: object) -> bool:
        pod = pod_spec(stage, **spec)
        claims = {v["name"]: v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
        mounts = {m["name"]: m for m in pod["containers"][0]["volumeMounts"]}
        if "model-cache" not in claims:
            return False
        assert claims["model-cache"] == {"claimName": "models"}
        assert mounts["model-cache"] == {"name": "model-cache", "mountPath": CACHE_MOUNT}
        return True

    assert all(mounted(stage, **cache, **merged) for stage in PIPELINE)
    assert [mounted(stage, **cache) for stage in PIPELINE] == [True, True, False], (
        "publish reads the base only to merge"
    )
    assert not any(mounted(stage, **merged) for stage in PIPELINE)


def test_only_prepare_reads_the_adapter_that_training_goes_on_from() -> None:
    adapter = {"uri": "pvc://adapters/old", "secretRef": {"name": "old-adapter"}}
    model = {"uri": "s3://models/smol", "initialAdapter": adapter}
    made = {stage: pod_spec(stage, model=model) for stage in PIPELINE}
    for stage, pod in made.items():
        secrets = {v["name"]: v["secret"]["secretName"] for v in pod["volumes"] if "secret" in v}
        claims = [v["persistentVolumeClaim"] for v in pod["volumes"] if "persistentVolumeClaim" in v]
        if stage is Stage.PREPARE:
            assert secrets["secret-initial-adapter"] == "old-adapter"
            assert claims == [{"claimName": "adapters", "readOnly": True}]
        else:
            assert "secret-initial-adapter" not in secrets
            assert claims == []


def test_trackers_secrets_are_mounted_where_they_are_checked_and_used() -> None:
    trackers = [
        {"type": "WeightsAndBiases", "secretRef": {"name": "wandb"}},
        {"type": "MLflow", "endpointURL": "https://mlflow.example.com", "secretRef": {"name": "mlflow"}},
        {"type": "TensorBoard"},
    ]
    for stage in PIPELINE:
        pod = pod_spec(stage, trackers=trackers)
        volumes = {v["name"]: v for v in pod["volumes"] if v["name"].startswith("secret-tracker-")}
        mounts = {m["name"]: m for m in pod["containers"][0]["volumeMounts"] if m["name"].startswith("secret-tracker-")}
        assert set(volumes) == set(mounts)
        if stage is Stage.PUBLISH:
            assert not volumes
            continue
        assert {v["secret"]["secretName"] for v in volumes.values()} == {"wandb", "mlflow"}
        assert all(v["secret"]["optional"] for v in volumes.values())
        assert mounts["secret-tracker-mlflow"]["mountPath"] == "/etc/finetune/secrets/tracker-mlflow"
        assert all(m["readOnly"] for m in mounts.values())
        assert "wandb" not in str(pod["containers"][0]["env"])
