"""Several processes train together: the same rows and the same normaliser as one, and they stop, fail and resume as one."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from finetune_api.failures import FAILURES, Reason
from finetune_trainer.train import run as train
from finetune_trainer.train.device import cpu_dtype
from tests.support.prepared import PreparedJob, prepare_job
from tests.support.train_process import kill_all, pod_of, steps
from tests.trainer.test_train_resume import adapter, curve, forget_the_result, markers, result

pytestmark = pytest.mark.timeout(900)
# 24 rows, 7 to a step: on two ranks with micro-batches of 2 a step is 2 + 2, then 2 + 1; the last step of the run is shorter.
SPEC: dict[str, Any] = {
    "method": {"type": "QLoRA", "lora": {"rank": 4, "dropout": 0.0}},
    "training": {"length": {"epochs": 3}, "globalBatchSequences": 7, "microBatchSequences": 2},
    "recovery": {"checkpoint": {"interval": {"steps": 3}}},
}
ROUNDING = 1e-4 if cpu_dtype() is torch.float32 else 2e-2
"""What another order of sums may change, after 11 steps. In bfloat16 one rounding is 2⁻⁸."""
TWO = {"compute": {"gpusPerNode": 2}}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    kill_all()


def test_two_ranks_train_as_one_does(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    """Also what the matrices begin with: one rank finds it, and the others have the same."""
    lora = {**SPEC["method"]["lora"], "initialization": "PiSSA"}
    spec = {**SPEC, "method": {**SPEC["method"], "lora": lora}}
    alone = prepare_job(s3, tmp_path / "one", tiny_model, **spec)
    train.run(alone.context())
    together = prepare_job(s3, tmp_path / "two", tiny_model, **spec, **TWO)
    pod = pod_of(together).start()
    assert pod.wait() == 0, pod.log
    assert len(curve(together)) == len(curve(alone)) == 11
    assert curve(together) == pytest.approx(curve(alone), rel=ROUNDING)
    assert result(together).metrics.held_out_loss == pytest.approx(result(alone).metrics.held_out_loss, rel=ROUNDING)
    assert result(together).metrics.tokens == result(alone).metrics.tokens


@pytest.fixture(scope="module")
def disturbed(s3: Any, tiny_model: Path, tmp_path_factory: Any) -> PreparedJob:
    """A longer job with dropout: every rank draws its own random numbers."""
    method = {"type": "LoRA", "lora": {"rank": 4, "dropout": 0.2}}
    spec = {**SPEC, **TWO, "method": method, "training": {**SPEC["training"], "length": {"steps": 26}}}
    return prepare_job(s3, tmp_path_factory.mktemp("job"), tiny_model, **spec)


def test_ranks_that_die_or_are_told_to_stop_end_with_the_same_bytes(disturbed: PreparedJob) -> None:
    job = disturbed
    assert pod_of(job).start().wait() == 0
    undisturbed = adapter(job)
    forget_the_result(job)

    # The last rank dies: all stop, the supervisor says which, and they start again from the checkpoint.
    pod = pod_of(job).start()
    pod.until_step(8)
    os.kill(pod.worker(), signal.SIGKILL)
    pod.until(lambda lines: any("rank 1 was ended by SIGKILL" in line for line in lines), seconds=60)
    made = len(steps(pod.lines))
    pod.until(lambda lines: len(steps(lines)) > made + 4)

    # SIGTERM: all leave at the same step, with one checkpoint that holds every rank's random states.
    pod.process.send_signal(signal.SIGTERM)
    assert pod.wait() == FAILURES[Reason.INTERRUPTED].exit_code, pod.log
    last = steps(pod.lines)[-1]
    assert f"checkpoint saved at step {last}" in pod.report.message
    newest = max(markers(job).values(), key=lambda m: m.step)
    assert (newest.step, newest.world_size) == (last, 2)
    assert {"rng_state.pth", "rng_state_1.pth"} <= {f.path for f in newest.files}

    pod = pod_of(job).start()
    assert pod.wait() == 0, pod.log
    assert steps(pod.lines)[0] == last + 1
    assert adapter(job) == undisturbed


def test_another_world_size_goes_on_with_the_same_rows_and_normaliser_and_says_so(
    s3: Any, tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    alone = prepare_job(s3, tmp_path / "one", tiny_model, **SPEC)
    train.run(alone.context())
    job = prepare_job(s3, tmp_path / "two", tiny_model, **SPEC, **TWO)
    pod = pod_of(job).start()
    pod.until_step(5)
    pod.process.send_signal(signal.SIGTERM)
    assert pod.wait() == FAILURES[Reason.INTERRUPTED].exit_code, pod.log
    train.run(job.context(execution="execution-2"))  # one process
    assert "made by 2 ranks, this run has 1: same rows, same normaliser" in caplog.text
    assert curve(job) == pytest.approx(curve(alone), rel=ROUNDING)
