"""The base shared out over ranks (FSDP): the same numbers as with whole copies, and no rank ever holds much more than its part."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from finetune_api.failures import FAILURES, Reason
from finetune_trainer.errors import StageError
from finetune_trainer.train import sharded
from finetune_trainer.train.device import Compute
from finetune_trainer.train.ranks import Ranks
from tests.support.prepared import PreparedJob, job_spec, prepare_job, snapshot_of
from tests.support.tiny_model import build_tiny_model
from tests.support.train_process import kill_all, pod_of, steps
from tests.trainer.test_train_resume import curve, result

pytestmark = pytest.mark.timeout(600)
CPU = Compute(torch.device("cpu"), torch.float32, "cpu")
# 24 rows, 7 to a step: on two ranks some micro-batches are empty, and the ranks must compute all the same.
SPEC: dict[str, Any] = {
    "training": {"length": {"epochs": 3}, "globalBatchSequences": 7, "microBatchSequences": 2},
    "recovery": {"checkpoint": {"interval": {"steps": 3}}},
    "evaluation": {"intervalSteps": 4},
    "compute": {"gpusPerNode": 2},
}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    kill_all()


def weights(job: PreparedJob) -> bytes:
    return job.context().output_store().get_bytes("adapter/adapter_model.safetensors")


def answers(job: PreparedJob) -> Any:
    return json.loads(job.context().output_store().get_bytes("reports/answers.json"))


@pytest.mark.parametrize("method", ["LoRA", "QLoRA"])
def test_shards_give_the_bytes_that_whole_copies_give_also_after_an_interruption(
    s3: Any, tiny_model: Path, tmp_path: Path, method: str
) -> None:
    spec = {**SPEC, "method": {"type": method, "lora": {"rank": 4, "dropout": 0.2}}}
    whole = prepare_job(s3, tmp_path / "whole", tiny_model, **spec)
    assert pod_of(whole).start().wait() == 0
    shards = prepare_job(
        s3, tmp_path / "shards", tiny_model, **{**spec, "training": {**spec["training"], "parallelism": "FSDP"}}
    )
    pod = pod_of(shards).start()
    pod.until_step(6)
    pod.process.send_signal(15)
    assert pod.wait() == FAILURES[Reason.INTERRUPTED].exit_code, pod.log
    made = steps(pod.lines)[-1]
    pod = pod_of(shards).start()
    assert pod.wait() == 0, pod.log
    assert steps(pod.lines)[0] == made + 1
    assert weights(shards) == weights(whole)
    assert curve(shards) == curve(whole)
    assert answers(shards) == answers(whole)
    assert result(shards).metrics.held_out_loss == result(whole).metrics.held_out_loss
    assert result(shards).selected_step == result(whole).selected_step


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """The first of two ranks, the other of which is only told of: sharding needs no word of it."""
    distributed.init_process_group("fake", rank=0, world_size=2)
    yield Ranks(0, 2, sharded=True)
    distributed.destroy_process_group()
