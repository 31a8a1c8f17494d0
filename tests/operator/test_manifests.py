"""What the Jobs of the stages ask for."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.failures import FAILURES, INTERRUPTED_EXIT_CODES, Consequence, Failure
from finetune_api.names import ANNOTATION_MEMORY, ENV_GRACE_SECONDS, PIPELINE, Stage
from finetune_operator.manifests import Owner, stage_job
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
