"""Failures of training that need neither a GPU nor a cluster, each brought about for real, or by its library's own exception."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.base import ApiModel
from finetune_api.failures import FAILURES, Reason
from finetune_trainer.context import StageContext
from finetune_trainer.entrypoint import explain
from finetune_trainer.errors import StageError
from finetune_trainer.train import device, evaluate, fit, inputs, model, save, verify
from finetune_trainer.train import run as train
from finetune_trainer.train.capture import Captured, write_files
from finetune_trainer.train.checkpoint_writer import as_stage_error
from finetune_trainer.train.trainer import LoraTrainer
from tests.support.fault_proxy import FaultProxy
from tests.support.prepared import job_spec, prepare_job, snapshot_of
from tests.trainer.test_base_entrypoint import ended
from tests.trainer.test_supervisor_process import rewrite_prepared
from tests.trainer.test_train_resume import interrupt

CPU = device.Compute(torch.device("cpu"), torch.float32, "cpu")
MODELING = """
from transformers import PretrainedConfig, PreTrainedModel

class OwnConfig(PretrainedConfig):
    model_type = "own"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig

    def __init__(self, config):
        raise RuntimeError("kernels for this card are missing")
"""


def test_code_that_came_with_the_model_is_named_when_it_fails(tmp_path: Path) -> None:
    (tmp_path / "modeling_own.py").write_text(MODELING)
    auto_map = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnModel"}
    config = {"model_type": "own", "architectures": ["OwnModel"], "auto_map": auto_map}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    spec = job_spec(None, "bucket", model={"trustRemoteCode": True})
    with pytest.raises(RuntimeError) as caught:
        model.load_base(tmp_path, snapshot_of(spec, "u" * 32), CPU)
    reason, message = explain(caught.value)
    assert reason is Reason.USER_CODE
    assert "modeling_own.py:11 (__init__)" in message
    assert "kernels for this card are missing" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_told_apart_and_retried(tmp_path: Path, small_disk: Path) -> None:
    def fill(ctx: StageContext) -> ApiModel:
        (small_disk / "weights").write_bytes(bytes(1 << 20))
        raise AssertionError("the disk took it")

    code, message = ended(tmp_path, fill)
    assert (code, message["reason"]) == (FAILURES[Reason.DISK_FULL].exit_code, "DiskFull")


@pytest.mark.timeout(120)
@pytest.mark.parametrize("moment", ["opening", "evaluating", "saving", "fetching back", "reporting"])
def test_a_gpu_is_not_held_for_a_store_that_stays_away(
    s3: Any, s3_proxy: FaultProxy, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    job = prepare_job(s3, tmp_path, tiny_model, training={"length": {"steps": 2}})
    for slot in ("model", "output"):
        s3.write_secret(tmp_path / "secrets" / slot, endpoint=s3_proxy.endpoint)
    for module in (train, fit, inputs, save, verify):
        monkeypatch.setattr(module, "GPU_PATIENCE_SECONDS", 1)
    module, name = {
        "opening": (train, "open_stores"),
        "evaluating": (evaluate, "held_out_loss"),
        "saving": (save, "upload_adapter"),
        "fetching back": (verify, "fetch_back"),
        "reporting": (train, "upload_reports"),
    }[moment]
    original = getattr(module, name)

    def gone(*args: Any, **kwargs: Any) -> Any:
        if not s3_proxy.faults.away:
            s3_proxy.go_away()
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, gone)
    with pytest.raises(StageError) as caught:
        train.run(job.context())
    assert caught.value.reason is Reason.STORAGE_UNAVAILABLE


LARGE, SMALL = torch.zeros(100_000), torch.zeros(10)


@pytest.mark.parametrize(
    ("adapter", "optimizer"), [(LARGE, SMALL), (SMALL, LARGE)], ids=["in safetensors", "in torch's zip file"]
)
def test_a_checkpoint_that_the_disk_has_no_room_for_is_a_full_disk(
    small_disk: Path, adapter: torch.Tensor, optimizer: torch.Tensor
) -> None:
    state = Captured(3, {"a": adapter}, {}, {"o": optimizer}, {}, None, [], "{}", {})
    with pytest.raises(Exception) as caught:
        write_files(state, small_disk / "checkpoint")
    reason, message = explain(caught.value)
    assert (reason, message[:13]) == (Reason.DISK_FULL, "no space left")
    told = as_stage_error(caught.value)
    assert (told.reason, told.message[:13]) == (Reason.DISK_FULL, "no space left")


@pytest.mark.parametrize(
    "error",
    [
        torch.distributed.DistBackendError("NCCL communicator was aborted on rank 1"),
        torch.distributed.DistNetworkError("Connection reset by peer"),
        torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    ],
    ids=lambda e: type(e).__name__,
)
def test_errors_of_devices_and_of_their_network_are_rank_failures(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    job = prepare_job(s3, tmp_path, tiny_model, training={"length": {"steps": 3}})

    def fail() -> None:
        raise error

    interrupt(monkeypatch, 2, 1, fail)
    with pytest.raises(type(error)) as caught:
        train.run(job.context())
    reason, message = explain(caught.value)
    assert reason is Reason.RANK_FAILURE
    assert str(error) in message


def test_a_loss_that_rises_and_stays_there_ends_as_diverged(
    s3: Any, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = prepare_job(s3, tmp_path, tiny_model, training={"length": {"steps": 80}, "microBatchSequences": 8})
    original = LoraTrainer.compute_loss

    def rising(self: LoraTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        return original(self, *args, **kwargs) * (1 if self.state.global_step < 25 else 10)

    monkeypatch.setattr(LoraTrainer, "compute_loss", rising)
    with pytest.raises(StageError, match=r"training loss was \d+") as caught:
        train.run(job.context())
    assert caught.value.reason is Reason.DIVERGED
    allowed = job.with_spec(recovery={"stopOnDivergence": False})
    rewrite_prepared(job, allowed)
    train.run(allowed.context())
