"""Bad input: the reason and the advice within a minute, and no pod that asks for a GPU ever existed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from demo import store
from tests.e2e.stack import BUCKET, GPU, TINY_MODEL, Space, condition, finished, is_true, rows, spec_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]
SECONDS = 60
Case = Callable[[Space], dict[str, Any]]


def malformed_line(space: Space) -> dict[str, Any]:
    return spec_for(space.put(rows(20) + "<html>\n"))


def wrong_columns(space: Space) -> dict[str, Any]:
    return spec_for(space.put("".join(json.dumps({"question": "a", "answer": "b"}) + "\n" for _ in range(20))))


def empty_after_filtering(space: Space) -> dict[str, Any]:
    data = {
        "train": [{"uri": space.put('{"text": ""}\n' * 5), "secretRef": {"name": store.SECRET}}],
        "checks": {"maxBadRows": 5},
    }
    return spec_for("", data=data)


def too_few_rows(space: Space) -> dict[str, Any]:
    return spec_for(space.put(rows(1)))


def no_such_dataset(space: Space) -> dict[str, Any]:
    return spec_for(f"s3://{BUCKET}/nowhere/train.jsonl")


def no_such_model(space: Space) -> dict[str, Any]:
    return spec_for(space.put(rows(20)), model={"uri": f"s3://{BUCKET}/no-model"})


def no_such_bucket(space: Space) -> dict[str, Any]:
    return spec_for(space.put(rows(20)), output={"uri": "s3://no-such-bucket/results"})


def no_such_model_bucket(space: Space) -> dict[str, Any]:
    return spec_for(space.put(rows(20)), model={"uri": "s3://no-such-bucket/model"})


def no_such_data_bucket(space: Space) -> dict[str, Any]:
    return spec_for("s3://no-such-bucket/train.jsonl")


def wrong_credentials_for_data(space: Space) -> dict[str, Any]:
    space.secret("wrong", AWS_ACCESS_KEY_ID="nobody", AWS_SECRET_ACCESS_KEY="wrong", AWS_ENDPOINT_URL=store.IN_CLUSTER)
    return spec_for("", data={"train": [{"uri": space.put(rows(20)), "secretRef": {"name": "wrong"}}]})


def wrong_credentials(space: Space) -> dict[str, Any]:
    space.secret("wrong", AWS_ACCESS_KEY_ID="nobody", AWS_SECRET_ACCESS_KEY="wrong", AWS_ENDPOINT_URL=store.IN_CLUSTER)
    return spec_for(space.put(rows(20)), output={"secretRef": {"name": "wrong"}})


def unknown_target_module(space: Space) -> dict[str, Any]:
    return spec_for(space.put(rows(20)), method={"lora": {"targetModules": ["q_proj", "query"]}})


def too_large_for_the_gpu(space: Space) -> dict[str, Any]:
    small = {"gpusPerNode": 1, "gpu": {"resourceName": GPU, "memory": "500Mi"}}
    return spec_for(space.put(rows(20)), compute=small, training={"useCpu": False})


FOR_GOOD: list[tuple[Case, str, list[str]]] = [
    (malformed_line, "InvalidData", ["train.jsonl:21", "maxBadRows"]),
    (wrong_columns, "InvalidData", ["question", "answer"]),
    (empty_after_filtering, "TooFewRows", ["Add rows"]),
    (too_few_rows, "TooFewRows", ["heldOut"]),
    (no_such_dataset, "DatasetNotFound", ["nowhere/train.jsonl"]),
    (no_such_model, "ModelNotFound", ["no-model"]),
    (no_such_bucket, "BucketNotFound", ["no-such-bucket"]),
    (wrong_credentials, "AccessDenied", ["Secret"]),
    (no_such_model_bucket, "BucketNotFound", ["no-such-bucket"]),
    (no_such_data_bucket, "BucketNotFound", ["no-such-bucket"]),
    (wrong_credentials_for_data, "AccessDenied", ["Secret"]),
    (unknown_target_module, "UnknownTargetModule", ["query", "v_proj"]),
    (too_large_for_the_gpu, "DoesNotFit", ["too little", "compute.gpu.memory"]),
]


@pytest.mark.parametrize(("case", "reason", "words"), FOR_GOOD, ids=[c[0].__name__ for c in FOR_GOOD])
def test_fails_for_good_with_reason_and_advice(space: Space, case: Case, reason: str, words: list[str]) -> None:
    space.apply("bad", case(space))
    job = space.until("bad", finished, SECONDS, f"failed with {reason}")
    failed = condition(job, "Failed")
    assert failed["reason"] == reason, failed
    assert failed["message"].startswith(f"{reason}: ")
    assert failed["message"].endswith("No GPU was used.")
    for word in words:
        assert word in failed["message"]
    assert job["status"]["phase"] == "Failed"
    assert not space.gpu_pods.so_far()


def waits_for(reason: str) -> Callable[[dict[str, Any]], bool]:
    return lambda job: is_true(job, "Waiting") and condition(job, "Waiting")["reason"] == reason


def test_a_missing_secret_is_waited_for_and_heals(space: Space) -> None:
    spec = spec_for(space.put(rows(20)), output={"secretRef": {"name": "later"}})
    space.apply("waits", spec)
    job = space.until("waits", waits_for("SecretMissing"), SECONDS, "waiting for the Secret")
    assert "later" in condition(job, "Waiting")["message"]
    assert not space.gpu_pods.so_far()
    key, secret = store.credentials(space.target)
    space.secret("later", AWS_ACCESS_KEY_ID=key, AWS_SECRET_ACCESS_KEY=secret, AWS_ENDPOINT_URL=store.IN_CLUSTER)
    job = space.until("waits", finished, 400, "finished")
    assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
    assert condition(job, "Waiting")["status"] == "False"


def test_an_unreachable_endpoint_is_waited_for_until_the_timeout(space: Space) -> None:
    spec = spec_for(space.put(rows(20)), output={"endpointURL": "http://127.0.0.1:9"}, pendingTimeoutSeconds=20)
    space.apply("waits", spec)
    space.until("waits", waits_for("StorageUnavailable"), SECONDS, "waiting for the store")
    job = space.until("waits", finished, SECONDS, "timed out")
    failed = condition(job, "Failed")
    assert failed["reason"] == "PendingTimeout"
    assert "StorageUnavailable" in failed["message"]
    assert "127.0.0.1:9" in failed["message"]
    assert not space.gpu_pods.so_far()


def test_an_unreachable_endpoint_heals_when_it_answers(space: Space) -> None:
    """The endpoint's name stands for a host that does not exist, and then for the store."""
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "store", "namespace": space.name},
        "spec": {"type": "ExternalName", "externalName": "no-such-host.invalid"},
    }
    space.target.apply(service)
    endpoint = f"http://store.{space.name}.svc:{store.PORT}"
    space.apply("waits", spec_for(space.put(rows(20)), output={"endpointURL": endpoint}))
    space.until("waits", waits_for("StorageUnavailable"), SECONDS, "waiting for the store")
    assert not space.gpu_pods.so_far()
    service["spec"] = {"type": "ExternalName", "externalName": f"{store.SERVICE}.{store.NAMESPACE}.svc.cluster.local"}
    space.target.apply(service)
    job = space.until("waits", finished, 400, "finished")
    assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)


def test_a_missing_image_is_waited_for_before_a_gpu_is_asked_for(space: Space) -> None:
    spec = spec_for(space.put(rows(20)), runtime={"image": "127.0.0.1:5999/no/image:1"}, pendingTimeoutSeconds=20)
    space.apply("waits", spec)
    job = space.until("waits", waits_for("ImageUnavailable"), SECONDS, "waiting for the image")
    assert "127.0.0.1:5999/no/image:1" in condition(job, "Waiting")["message"]
    job = space.until("waits", finished, SECONDS, "timed out")
    assert condition(job, "Failed")["reason"] == "PendingTimeout"
    assert not space.gpu_pods.so_far()


def test_a_gpu_that_never_comes_is_named_and_timed_and_heals_when_it_comes(space: Space) -> None:
    compute = {"gpu": {"product": "Unobtainium"}}
    space.apply("waits", spec_for(space.put(rows(20)), compute=compute))
    job = space.until("waits", waits_for("Unschedulable"), SECONDS, "waiting for a GPU")
    assert f"1 × {GPU}" in condition(job, "Waiting")["message"]
    assert job["status"]["phase"] == "Queued"
    nodes = [n["metadata"]["name"] for n in space.target.get("nodes")["items"]]
    label = f"{GPU}.product"
    before = space.target.get("node", nodes[0])["metadata"]["labels"].get(label)
    try:
        space.target.kubectl("label", "node", nodes[0], f"{label}=Unobtainium", "--overwrite")
        job = space.until("waits", finished, 400, "finished")
        assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
    finally:
        back = f"{label}={before}" if before else f"{label}-"
        space.target.kubectl("label", "node", nodes[0], back, "--overwrite")


def test_a_gpu_that_never_comes_fails_after_the_timeout_and_leaves_no_pod(space: Space) -> None:
    spec = spec_for(space.put(rows(20)), compute={"gpu": {"product": "Unobtainium"}}, pendingTimeoutSeconds=15)
    space.apply("waits", spec)
    job = space.until("waits", finished, 120, "timed out")
    failed = condition(job, "Failed")
    assert failed["reason"] == "PendingTimeout"
    assert "Unschedulable" in failed["message"]
    space.target.kubectl(
        "wait", "pods", "-n", space.name, "-l", "finetune.dev/stage=train", "--for=delete", "--timeout=60s"
    )


def test_a_gated_model_without_token_fails_with_what_to_do(space: Space, hub_url: str) -> None:
    model = {"uri": "hf://acme/gated", "endpointURL": hub_url, "secretRef": None}
    spec = spec_for(space.put(rows(20)), model={k: v for k, v in model.items() if v})
    del spec["model"]["secretRef"]
    space.apply("gated", spec)
    job = space.until("gated", finished, SECONDS, "failed")
    failed = condition(job, "Failed")
    assert failed["reason"] == "GatedModel"
    assert "HF_TOKEN" in failed["message"]
    assert not space.gpu_pods.so_far()


def test_the_tiny_model_is_where_these_tests_say() -> None:
    assert TINY_MODEL.startswith(f"s3://{BUCKET}/")
