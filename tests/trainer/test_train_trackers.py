"""The train stage with trackers that work, hang and refuse: the result is the same bytes, and nothing waits for them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune_api import names
from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.results import MANIFEST, PREPARE_RESULT, TRAIN_RESULT, Manifest, PrepareResult, TrainResult
from finetune_trainer.errors import Interrupted, StageError
from finetune_trainer.publish import run as publish
from finetune_trainer.stored import read_stored
from finetune_trainer.trackers import tracking
from finetune_trainer.trackers.event_files import EVENT_FILE
from finetune_trainer.trackers.tracking import Tracking, configuration
from finetune_trainer.train import run as train
from finetune_trainer.train.trainer import LoraTrainer
from tests.support.prepared import PreparedJob, prepare_job
from tests.support.tracker_servers import MlflowServer, WandbServer
from tests.support.train_process import ROOT

STEPS = 8
SPEC: dict[str, Any] = {
    "method": {"type": "LoRA", "lora": {"rank": 4, "dropout": 0.2}},
    "training": {"length": {"steps": STEPS}},
    "evaluation": {"intervalSteps": 3},
    "recovery": {"checkpoint": {"interval": {"steps": 3}}},
}


def tracked(s3: Any, model: Path, folder: Path, *trackers: dict[str, Any], **secrets: dict[str, str]) -> PreparedJob:
    """A job with trackers; ``secrets`` by slot."""
    job = prepare_job(s3, folder, model, **SPEC, **({"trackers": list(trackers)} if trackers else {}))
    for slot, values in secrets.items():
        mounted = folder / "secrets" / slot.replace("_", "-")
        mounted.mkdir(parents=True)
        for key, value in values.items():
            (mounted / key).write_text(value)
    return job


def adapter(job: PreparedJob) -> bytes:
    return job.context().output_store().get_bytes("adapter/adapter_model.safetensors")


def result(job: PreparedJob) -> TrainResult:
    return job.context().workspace_store().get_model(TRAIN_RESULT, TrainResult)


def curves(job: PreparedJob, folder: Path) -> EventAccumulator:
    """What TensorBoard shows."""
    folder.mkdir()
    (folder / EVENT_FILE).write_bytes(job.context().output_store().get_bytes(f"reports/tensorboard/{EVENT_FILE}"))
    found = EventAccumulator(str(folder))
    found.Reload()
    return found


def mlflow_at(server: MlflowServer) -> dict[str, Any]:
    return {"type": "MLflow", "endpointURL": server.url}


def test_trackers_that_hang_and_refuse_change_no_byte_and_are_warned_of(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FLUSH_SECONDS", 3.0)
    plain = tracked(s3, tiny_model, tmp_path / "plain")
    train.run(plain.context())
    with MlflowServer() as hanging, WandbServer() as refusing:
        hanging.hangs.set()
        wandb = {"type": "WeightsAndBiases", "endpointURL": refusing.url, "secretRef": {"name": "wandb"}}
        job = tracked(
            s3, tiny_model, tmp_path / "tracked", mlflow_at(hanging), wandb, {"type": "TensorBoard"},
            tracker_weightsandbiases={"WANDB_API_KEY": "f" * 40},
        )  # fmt: skip
        train.run(job.context())
    assert adapter(job) == adapter(plain)
    tracked_runs = result(job).tracked
    assert [(t.type.value, t.problem is None, t.missing_lines > STEPS) for t in tracked_runs] == [
        ("TensorBoard", True, False),
        ("MLflow", False, True),
        ("WeightsAndBiases", False, True),
    ]

    publish.run(job.context(Stage.PUBLISH))
    text = job.context().output_store().get_bytes(MANIFEST).decode()
    manifest = Manifest.model_validate_json(text)
    assert manifest.tracked == tracked_runs
    assert {w.partition(":")[0] for w in manifest.warnings} == {"MLflow", "WeightsAndBiases"}
    assert f"reports/tensorboard/{EVENT_FILE}" in {f.path for f in manifest.files}
    page = job.context().output_store().get_bytes("reports/index.html").decode()
    assert f"TensorBoard <code>{job.snapshot.output}/reports/tensorboard</code>" in page
    assert "f" * 40 not in text


def test_a_stop_waits_for_no_tracker_and_the_next_execution_goes_on_in_the_same_run(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, told = LoraTrainer.compute_loss, {"at": 0.0}

    def compute_loss(self: LoraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = original(self, *args, **kwargs)
        if self.state.global_step + 1 == 6 and not told["at"]:
            deadline = time.monotonic() + 60
            while (not server.runs or len(server.points("train/loss")) < 5) and time.monotonic() < deadline:
                time.sleep(0.1)
            server.hangs.set()
            told["at"] = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(LoraTrainer, "compute_loss", compute_loss)
    with MlflowServer() as server:
        job = tracked(s3, tiny_model, tmp_path / "job", mlflow_at(server), {"type": "TensorBoard"})
        with pytest.raises(Interrupted):
            train.run(job.context(execution="execution-1"))
        assert time.monotonic() - told["at"] < 10
        server.hangs.clear()
        train.run(job.context(execution="execution-2"))
        assert [step for step, _ in server.points("train/loss")] == list(range(1, STEPS + 1))
        assert [step for step, _ in server.points("eval/loss")] == [0, 3, 6, 8]
        (run,) = server.runs.values()
        assert run["info"]["status"] == "FINISHED"
        losses = server.points("train/loss")
    assert result(job).resumed_from_steps == [5]
    [files, mlflow] = result(job).tracked
    assert (files.url, mlflow.problem, mlflow.missing_lines) == (f"{job.snapshot.output}/reports/tensorboard", None, 0)
    shown = curves(job, tmp_path / "events")
    assert [(e.step, pytest.approx(e.value)) for e in shown.Scalars("train/loss")] == losses
    assert [e.step for e in shown.Scalars("eval/loss")] == [0, 3, 6, 8]


def told_of(job: PreparedJob, server: MlflowServer, error: BaseException) -> float:
    """A training that makes two steps and ends with ``error``; how long its trackers took to end."""
    ctx = job.context()
    prepared = read_stored(ctx.workspace_store(), PREPARE_RESULT, PrepareResult)
    steps = [{"step": n, "loss": 1.0} for n in (1, 2)]
    began = 0.0

    def training() -> None:
        nonlocal began
        with Tracking(ctx) as told:
            told.follow(prepared, 2.0, lambda: steps, list)
            deadline = time.monotonic() + 60
            while not server.runs or len(server.points("train/loss")) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            began = time.monotonic()
            raise error

    with pytest.raises(type(error)):
        training()
    return time.monotonic() - began


def test_a_run_is_failed_only_if_the_training_has_failed_for_good(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    for error, status in (
        (StageError(Reason.DIVERGED, "the loss rises"), "FAILED"),
        (StageError(Reason.STORAGE_UNAVAILABLE, "away"), "RUNNING"),
        (Interrupted(), "RUNNING"),
    ):
        with MlflowServer() as server:
            job = tracked(s3, tiny_model, tmp_path / type(error).__name__ / status, mlflow_at(server))
            assert told_of(job, server, error) < 10
            (run,) = server.runs.values()
            assert run["info"]["status"] == status


def test_a_stop_while_trackers_are_waited_for_finds_the_result_in_the_bucket(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(self: Tracking) -> None:
        raise Interrupted

    monkeypatch.setattr(Tracking, "results", stopped)
    job = tracked(s3, tiny_model, tmp_path, {"type": "MLflow", "endpointURL": "http://127.0.0.1:1"})
    with pytest.raises(Interrupted):
        train.run(job.context(execution="execution-1"))
    assert train.run(job.context(execution="execution-2")).metrics == result(job).metrics
    assert result(job).execution_id == "execution-1"


def test_the_configuration_that_is_told_has_no_secret(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    job = tracked(s3, tiny_model, tmp_path, {"type": "TensorBoard"})
    train_source = {"uri": "https://me:password@data.test/x.jsonl?signature=abc"}
    job = job.with_spec(data={"train": [train_source]}, runtime={"env": [{"name": "KEY", "value": "password"}]})
    prepared = read_stored(job.context().workspace_store(), PREPARE_RESULT, PrepareResult)
    told = configuration(job.snapshot, prepared)
    assert told["spec"]["data"]["train"][0]["uri"] == "https://data.test/x.jsonl"
    assert told["plan"]["method"]["lora"]["alpha"] == 8
    assert "password" not in str(told)
    assert "signature" not in str(told)


SCRIPT = """
import sys
from pathlib import Path
from finetune_api.names import Stage
from finetune_trainer.train import run
from tests.support.train_container import context
run.run(context(Path(sys.argv[1]), Stage.TRAIN))
print([name for name in ("wandb", "mlflow", "trackio", "tensorboard") if name in sys.modules])
"""


def test_without_trackers_none_of_their_libraries_is_imported(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    job = tracked(s3, tiny_model, tmp_path)
    mount = tmp_path / "snapshot"
    mount.mkdir()
    (mount / names.SNAPSHOT_KEY).write_text(job.snapshot.canonical_json())
    environ = {
        **os.environ,
        names.ENV_POD_UID: "pod-1",
        "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "api", "trainer", "cluster")),
    }
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)], env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines()[-1] == "[]"
