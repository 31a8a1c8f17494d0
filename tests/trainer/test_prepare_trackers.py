"""What the prepare stage finds out about trackers before a GPU is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.names import tracker_slot
from finetune_api.spec import TrackerType
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.trackers import check_trackers, needed, request
from finetune_trainer.trackers.places import address, space_of
from tests.support.tracker_servers import FakeServer, MlflowServer, WandbServer
from tests.support.trainer_run import Pod

SPEC: dict[str, Any] = {
    "model": {"uri": "hf://a/b"},
    "data": {"train": [{"uri": "s3://bucket/x.jsonl"}]},
    "output": {"uri": "s3://bucket"},
}


def check(root: Path, kind: str, endpoint: str | None = None, secret: dict[str, str] | None = None) -> list[str]:
    """With the Secret as given; None: no secretRef, empty: it is missing."""
    tracker: dict[str, Any] = {"type": kind}
    if endpoint is not None:
        tracker["endpointURL"] = endpoint
    if secret is not None:
        tracker["secretRef"] = {"name": "keys"}
    pod = Pod(root)
    slot = pod.secrets / tracker_slot(kind)
    slot.mkdir(parents=True)
    for key, value in (secret or {}).items():
        (slot / key).write_text(value)
    return check_trackers(pod.context({**SPEC, "trackers": [tracker]}))


def failure(root: Path, kind: str, endpoint: str | None = None, secret: dict[str, str] | None = None) -> StageError:
    with pytest.raises(StageError) as info:
        check(root, kind, endpoint, secret)
    return info.value


def test_no_tracker_and_tensorboard_need_nothing(tmp_path: Path) -> None:
    assert check_trackers(Pod(tmp_path / "none").context(SPEC)) == []
    assert check(tmp_path / "files", "TensorBoard") == []


def test_servers_that_take_the_credentials_are_asked_once(tmp_path: Path) -> None:
    with WandbServer() as wandb, MlflowServer("token") as mlflow:
        assert check(tmp_path / "a", "WeightsAndBiases", wandb.url, {"WANDB_API_KEY": wandb.key}) == []
        secret = {"MLFLOW_TRACKING_URI": mlflow.url, "MLFLOW_TRACKING_TOKEN": "token"}
        assert check(tmp_path / "b", "MLflow", None, secret) == []
        assert (len(wandb.requests), len(mlflow.requests)) == (1, 1)


@pytest.mark.parametrize(
    ("kind", "endpoint", "secret", "words"),
    [
        ("WeightsAndBiases", None, {}, "does not exist or is empty; expected the keys WANDB_API_KEY"),
        ("WeightsAndBiases", None, {"API_KEY": "x"}, "lacks WANDB_API_KEY; it has API_KEY"),
        ("MLflow", None, {"MLFLOW_TRACKING_TOKEN": "x"}, "lacks MLFLOW_TRACKING_URI"),
        ("MLflow", "http://127.0.0.1:1", {}, "expected the keys MLFLOW_TRACKING_TOKEN"),
        ("MLflow", "http://127.0.0.1:1", {"MLFLOW_TRACKING_USERNAME": "x"}, "lacks MLFLOW_TRACKING_PASSWORD"),
        ("Trackio", None, {"TRACKIO_WRITE_TOKEN": "x"}, "lacks TRACKIO_SERVER_URL"),
        ("Trackio", "http://127.0.0.1:1", {"HF_TOKEN": "x"}, "lacks TRACKIO_WRITE_TOKEN"),
        ("Trackio", "https://huggingface.co/spaces/a/b", {"TRACKIO_WRITE_TOKEN": "x"}, "lacks HF_TOKEN"),
    ],
)
def test_a_key_that_is_missing_is_waited_for(
    tmp_path: Path, kind: str, endpoint: str | None, secret: dict[str, str], words: str
) -> None:
    error = failure(tmp_path, kind, endpoint, secret)
    assert error.reason is Reason.SECRET_MISSING
    assert words in error.message


def test_refused_credentials_fail_the_job_and_are_not_told(tmp_path: Path) -> None:
    with WandbServer() as wandb, MlflowServer("token") as mlflow:
        refusals = [
            failure(tmp_path / "a", "WeightsAndBiases", wandb.url, {"WANDB_API_KEY": "wrong-key"}),
            failure(tmp_path / "b", "MLflow", mlflow.url, {"MLFLOW_TRACKING_TOKEN": "wrong-key"}),
        ]
    for error in refusals:
        assert error.reason is Reason.ACCESS_DENIED
        assert "refused the credentials (status 401)" in error.message
        assert "wrong-key" not in error.message


def test_a_key_that_graphql_knows_nobody_by_is_refused(tmp_path: Path) -> None:
    class Nobody(FakeServer):
        def answer(self, path: str, given: dict[str, Any], headers: Any) -> tuple[int, dict[str, Any]]:
            return 200, {"data": {"viewer": None}}

    with Nobody() as server:
        error = failure(tmp_path, "WeightsAndBiases", server.url, {"WANDB_API_KEY": "key"})
    assert error.reason is Reason.ACCESS_DENIED


def test_a_server_that_is_away_or_unwell_is_only_warned_of(tmp_path: Path) -> None:
    [warning] = check(tmp_path / "a", "MLflow", "http://127.0.0.1:1")
    assert warning.startswith("MLflow: http://127.0.0.1:1 cannot be reached (ConnectError)")
    with MlflowServer() as server:
        server.status = 502
        [warning] = check(tmp_path / "b", "MLflow", server.url)
    assert warning.startswith(f"MLflow: {server.url} answered 502")


def test_a_place_that_no_pod_can_reach_is_refused(tmp_path: Path) -> None:
    error = failure(tmp_path, "MLflow", None, {"MLFLOW_TRACKING_URI": "postgresql://me:secret@db/runs"})
    assert error.reason is Reason.INVALID_CONFIG
    assert "begins with 'postgresql://'; expected the http:// or https:// address" in error.message
    assert "secret" not in error.message
    error = failure(tmp_path / "b", "MLflow", None, {"MLFLOW_TRACKING_URI": "token-under-the-wrong-key"})
    assert "MLFLOW_TRACKING_URI is no address" in error.message
    assert "token-under" not in error.message


def test_a_place_is_the_specs_then_the_secrets_then_the_librarys_own() -> None:
    secret = {"WANDB_BASE_URL": "https://b/", "TRACKIO_SPACE_ID": "acme/runs"}
    assert address(TrackerType.WEIGHTS_AND_BIASES, "https://a/", secret) == "https://a"
    assert address(TrackerType.WEIGHTS_AND_BIASES, None, secret) == "https://b"
    assert address(TrackerType.WEIGHTS_AND_BIASES, None, {}) == "https://api.wandb.ai"
    assert address(TrackerType.TRACKIO, None, secret) == "acme/runs"
    assert address(TrackerType.MLFLOW, None, secret) is None
    assert space_of("https://huggingface.co/spaces/acme/runs") == space_of("acme/runs") == "acme/runs"
    assert space_of("https://trackio.example.com/a") is None


def test_a_space_is_asked_for_by_whoever_the_token_is() -> None:
    import httpx

    with httpx.Client() as client:
        asked = request(client, TrackerType.TRACKIO, "acme/runs", {"HF_TOKEN": "hf_x"})
    assert (str(asked.url), asked.headers["Authorization"]) == ("https://huggingface.co/api/whoami-v2", "Bearer hf_x")
    assert needed(TrackerType.TRACKIO, "acme/runs", {}) == ["HF_TOKEN"]
