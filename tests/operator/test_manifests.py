"""What the Jobs of the stages ask for."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.names import Stage
from finetune_operator.manifests import Owner, stage_job
from finetune_operator.settings import Settings
from tests.operator.world import UID, world

Raw = dict[str, Any]


def pod_spec(stage: Stage, **spec: object) -> Raw:
    w = world(**spec)
    w.make_snapshot()
    assert w.snapshot is not None
    job = stage_job(Owner("ns", "story", UID), w.snapshot, stage, Settings())
    return dict(job["spec"]["template"]["spec"])


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


@pytest.mark.parametrize("stage", list(Stage))
def test_the_container_is_named_after_its_stage_as_failure_policy_and_status_expect(stage: Stage) -> None:
    assert [c["name"] for c in pod_spec(stage)["containers"]] == [stage.value]
