"""The train stage on a tiny real model and a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.results import TRAIN_RESULT, TrainResult
from finetune_trainer.train import run as train
from finetune_trainer.train.device import Compute
from tests.support.prepared import PreparedJob, prepare_job

QLORA = {"method": {"type": "QLoRA"}}


def result_of(job: PreparedJob) -> TrainResult:
    return job.context().workspace_store().get_model(TRAIN_RESULT, TrainResult)


@pytest.fixture(scope="module", params=["LoRA", "QLoRA"])
def trained(request: pytest.FixtureRequest, s3: Any, tiny_model: Path, tmp_path_factory: Any) -> PreparedJob:
    """A job whose train stage has run."""
    job = prepare_job(s3, tmp_path_factory.mktemp("job"), tiny_model, method={"type": request.param})
    train.run(job.context())
    return job


def test_training_learns_and_leaves_a_verified_adapter(trained: PreparedJob, s3: Any) -> None:
    result = result_of(trained)
    assert result.metrics.held_out_loss < 0.8 * result.metrics.held_out_loss_base
    assert result.metrics.token_accuracy_base is not None
    assert result.metrics.token_accuracy is not None
    assert result.metrics.token_accuracy_base + 0.2 < result.metrics.token_accuracy <= 1
    metrics = trained.context().output_store().get_bytes("reports/metrics.jsonl").decode().splitlines()
    told = {e["step"]: e["token_accuracy"] for e in map(json.loads, metrics) if "held_out_loss" in e}
    assert told == {0: result.metrics.token_accuracy_base, result.metrics.steps: result.metrics.token_accuracy}
    assert result.verification.relative_difference < 1e-6
    keys = s3.keys(trained.bucket, trained.snapshot.output.key)
    names = {k.removeprefix(trained.snapshot.output.key + "/") for k in keys}
    assert {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
        "reports/metrics.jsonl",
        "reports/answers.json",
    } <= names
    assert "adapter/README.md" not in names


def test_prompts_that_only_check_the_tokenizer_are_not_answered_and_the_peak_is_that_of_all_the_stage(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([5 << 30, 7 << 30])  # after training, and after all evaluations and answers
    monkeypatch.setattr(Compute, "peak_bytes", lambda _: next(peaks))
    job = prepare_job(
        s3, tmp_path, tiny_model, prompts=1, only_checked=3, training={"length": {"steps": 1}},
        evaluation={"generation": {"prompts": 3}},
    )  # fmt: skip
    train.run(job.context())
    answers = json.loads(job.context().output_store().get_bytes("reports/answers.json"))
    assert [a["row"] for a in answers] == [0]
    assert result_of(job).metrics.peak_gpu_bytes == 7 << 30


def test_a_trained_snapshot_is_not_trained_again(trained: PreparedJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "pick_compute", lambda _: pytest.fail("trained again"))
    assert train.run(trained.context(execution="execution-2")).metrics == result_of(trained).metrics
