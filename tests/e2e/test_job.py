"""The main job, on the real cluster: apply, wait, and look at what is in the bucket."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from demo.target import SYSTEM_NAMESPACE
from tests.e2e.stack import BUCKET, Space, claim_on, condition, finished, is_true, rows, spec_for
from tests.support.hub_server import COMMIT

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def artifacts(space: Space, job: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Prefix of the job's output in the bucket, and its manifest."""
    uri = job["status"]["artifacts"]["uri"]
    prefix = uri.removeprefix(f"s3://{BUCKET}/").rstrip("/")
    manifest = json.loads(space.bucket.get_object(Bucket=BUCKET, Key=f"{prefix}/manifest.json")["Body"].read())
    return prefix, manifest


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_a_job_leaves_a_whole_verified_result_and_a_true_status(space: Space, method: str) -> None:
    spec = spec_for(space.put(rows(40)), method={"type": method, "lora": {"rank": 4}})
    spec["output"]["merged"] = {"enabled": True}
    space.apply("whole", spec)
    job = space.until("whole", finished, 600, "finished")
    status = job["status"]
    assert is_true(job, "Complete"), json.dumps(status, indent=1)
    assert status["phase"] == "Succeeded"
    assert status["observedGeneration"] == job["metadata"]["generation"]
    assert status["plan"]["method"] == method
    assert status["progress"]["summary"] == "2/2"
    assert status["metrics"]["heldOutLoss"] > 0
    assert 0 <= status["gpuTime"]["trainingSeconds"] <= status["gpuTime"]["heldSeconds"]
    assert [a["stage"] for a in status["attempts"]] == ["prepare", "train", "publish"]

    prefix, manifest = artifacts(space, job)
    listed = {
        o["Key"].removeprefix(f"{prefix}/"): o["Size"]
        for o in space.bucket.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}/")["Contents"]
    }
    named = {f["path"]: f for f in manifest["files"]}
    assert set(listed) == {*named, "manifest.json"}, "the manifest names every file, and the workspace is gone"
    for path, record in named.items():
        body = space.bucket.get_object(Bucket=BUCKET, Key=f"{prefix}/{path}")["Body"].read()
        assert (len(body), hashlib.sha256(body).hexdigest()) == (record["size"], record["sha256"]), path
    assert {"adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tokenizer.json"} <= set(named)
    assert {"merged/model.safetensors", "merged/config.json", "reports/metrics.jsonl"} <= set(named)
    assert manifest["verification"]["relativeDifference"] <= 1e-3
    assert len(space.gpu_pods.so_far()) == 1, "one pod asked for a GPU: the training pod"
    space.until_told("whole", "Prepared", "Started", "Trained", "Succeeded")


def test_a_job_goes_on_from_anothers_adapter_with_everything_that_experts_set(space: Space) -> None:
    """In real pods: restricted, with a read-only root and the images' own libraries."""
    data = space.put(rows(60))
    lora = {"rank": 4, "rankPattern": {"down_proj": 2, "layers.0.mlp.down_proj": 6}}
    space.apply("first", spec_for(data, method={"type": "QLoRA", "lora": {**lora, "initialization": "LoftQ"}}))
    first = space.until("first", finished, 600, "finished")
    assert is_true(first, "Complete"), json.dumps(first["status"], indent=1)
    prefix, _ = artifacts(space, first)

    spec = spec_for(data, method={"type": "QLoRA", "lora": {**lora, "loraPlusLRRatio": 4}})
    spec["model"]["initialAdapter"] = {
        "uri": f"s3://{BUCKET}/{prefix}/adapter",
        "secretRef": spec["output"]["secretRef"],
    }
    spec["data"]["checks"] = {"pii": "Redact", "nearDuplicates": {"threshold": 0.9}}
    spec["training"] |= {"packing": True, "length": {"steps": 6}}
    spec["evaluation"] = {
        "intervalSteps": 1,
        "earlyStopping": {"patience": 2, "threshold": 100},
        "generation": {"prompts": 2, "maxNewTokens": 8, "metrics": ["ExactMatch", "ROUGE", "ChrF", "JSONValidity"]},
    }
    spec["trackers"] = [{"type": "TensorBoard"}]
    spec["output"]["merged"] = {"enabled": True}
    space.apply("second", spec)
    second = space.until("second", finished, 600, "finished")
    status = second["status"]
    assert is_true(second, "Complete"), json.dumps(status, indent=1)
    assert "stopped early after step 3" in status["metrics"]["summary"]
    assert status["metrics"]["text"]["answers"] == 2
    assert status["metrics"]["heldOutLossBase"] == first["status"]["metrics"]["heldOutLossBase"]
    _, manifest = artifacts(space, second)
    paths = {f["path"] for f in manifest["files"]}
    assert {"reports/metrics.json", "reports/index.html", "merged/model.safetensors"} <= paths
    assert any(path.startswith("reports/tensorboard/") for path in paths)
    assert manifest["initialAdapter"]["uri"] == f"s3://{BUCKET}/{prefix}/adapter"
    assert [w for w in manifest["warnings"] if "packing" in w] == []


def test_a_plan_alone_asks_for_no_gpu_and_stores_nothing(space: Space) -> None:
    """``examples/plan-only.yaml`` on a model that is here, for the GPU that nodes tell of by their labels."""
    gpu = {"training": {"useCpu": False}, "method": {"type": "Auto"}}
    space.apply("planned", spec_for(space.put(rows(40)), planOnly=True, **gpu))
    job = space.until("planned", finished, 300, "finished")
    assert condition(job, "Complete")["reason"] == "Planned"
    assert job["status"]["plan"]["method"] == "LoRA"
    assert "on 1 × Pretend: peak" in condition(job, "Complete")["message"]
    assert "GiB" in condition(job, "Complete")["message"]
    assert not space.gpu_pods.so_far()
    prefix = f"results/planned-{job['metadata']['uid'][:8]}"
    assert not space.bucket.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents")


def test_a_missing_gpu_is_an_error_unless_the_job_says_cpu(space: Space) -> None:
    """The node pretends to have GPUs: the pod is scheduled, and its container finds none."""
    space.apply("no-gpu", spec_for(space.put(rows(40)), training={"useCpu": False}))
    job = space.until("no-gpu", finished, 300, "finished")
    failed = condition(job, "Failed")
    assert failed["reason"] == "NoGPU"
    assert "training.useCpu" in failed["message"]


def test_the_operator_killed_in_the_middle_changes_nothing(space: Space) -> None:
    """Of a job whose two ranks share the base out."""
    two = {"compute": {"gpusPerNode": 2}, "training": {"parallelism": "FSDP"}}
    space.apply("steady", spec_for(space.put(rows(40)), **two))
    for stage in ("Preparing", "Training", "Publishing"):
        space.until("steady", lambda job, stage=stage: job.get("status", {}).get("phase") == stage, 300, stage)
        space.target.kubectl(
            "delete",
            "pod",
            "-n",
            SYSTEM_NAMESPACE,
            "-l",
            "app.kubernetes.io/name=finetune-operator",
            "--grace-period=0",
            "--force",
            "--wait=false",
        )
    job = space.until("steady", finished, 300, "finished")
    assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
    assert [a["stage"] for a in job["status"]["attempts"]] == ["prepare", "train", "publish"]


def test_model_from_the_hub_through_a_cache_and_data_from_a_volume(space: Space, hub_url: str, tmp_path: Path) -> None:
    data, cache = tmp_path / "volume", tmp_path / "cache"
    data.mkdir(mode=0o755)
    cache.mkdir()
    cache.chmod(0o777)
    (data / "train.jsonl").write_text(rows(40))
    volumes = [claim_on(space, "data", data, "ReadOnlyMany"), claim_on(space, "models", cache, "ReadWriteMany")]
    try:
        spec = spec_for("pvc://data/train.jsonl")
        spec["model"] = {"uri": "hf://acme/tiny", "revision": "main", "endpointURL": hub_url}
        spec["model"]["cache"] = {"claimName": "models"}
        del spec["data"]["train"][0]["secretRef"]
        space.apply("hub", spec)
        job = space.until("hub", finished, 400, "finished")
        assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
        _, manifest = artifacts(space, job)
        assert manifest["baseModel"]["commit"] == COMMIT
        assert job["status"]["snapshot"]["modelCommit"] == COMMIT
        assert len(list(cache.glob("*/model.safetensors"))) == 1
        logs = {a["stage"]: space.target.kubectl("logs", "-n", space.name, a["pod"]) for a in job["status"]["attempts"]}
        fetched = {stage: "into the model cache" in log for stage, log in logs.items()}
        assert (fetched["prepare"], fetched["train"]) == (True, False), "before a GPU was asked for, and once"
    finally:
        space.target.kubectl("delete", "pv", *volumes, "--wait=false")
