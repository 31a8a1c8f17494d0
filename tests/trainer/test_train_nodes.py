"""Several pods that train together: the bytes of one pod with as many ranks, whatever happens to any of them."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FAILURES, Reason
from finetune_api.names import ENV_LEADER, ENV_NODE_INDEX
from tests.support.prepared import PreparedJob, prepare_job
from tests.support.train_process import TrainPod, kill_all, pod_of, steps
from tests.trainer.test_train_resume import curve, result
from tests.trainer.test_train_sharded import answers, weights

pytestmark = pytest.mark.timeout(1200)
SPEC: dict[str, Any] = {
    "training": {"length": {"epochs": 4}, "globalBatchSequences": 7, "microBatchSequences": 2, "parallelism": "DDP"},
    "recovery": {"checkpoint": {"interval": {"steps": 3}}, "placementTimeoutSeconds": 60},
    "method": {"lora": {"rank": 4, "dropout": 0.2}},
}
TWO_PODS = {"nodes": 2, "gpusPerNode": 1}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    kill_all()


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return int(server.getsockname()[1])


def pods(job: PreparedJob) -> list[TrainPod]:
    leader = f"localhost:{free_port()}"
    return [pod(job, leader, index) for index in range(2)]


def pod(job: PreparedJob, leader: str, index: int) -> TrainPod:
    return pod_of(job, **{ENV_LEADER: leader, ENV_NODE_INDEX: str(index)})


def replaced(job: PreparedJob, old: TrainPod) -> TrainPod:
    return pod(job, old.environ[ENV_LEADER], int(old.environ[ENV_NODE_INDEX])).start()


def test_two_pods_give_the_bytes_of_one_whatever_becomes_of_them(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    one = prepare_job(s3, tmp_path / "one", tiny_model, **SPEC, compute={"gpusPerNode": 2})
    assert pod_of(one).start().wait() == 0
    two = prepare_job(s3, tmp_path / "two", tiny_model, **SPEC, compute=TWO_PODS)
    first, second = pods(two)
    first.start()
    second.start()
    first.until_step(4)

    second.kill()  # its node is gone
    first.until(lambda lines: any("pod 1 is gone" in line for line in lines))
    assert first.process.poll() is None, "the first pod stays"
    second = replaced(two, second)
    made = len(steps(first.lines))
    first.until(lambda lines: len(steps(lines)) > made + 2)

    second.process.send_signal(signal.SIGTERM)  # it is preempted
    assert second.wait() == FAILURES[Reason.INTERRUPTED].exit_code, second.log
    first.until(lambda lines: any("Pod 1 was told to stop" in line for line in lines))
    last = steps(first.lines)[-1]
    made = len(steps(first.lines))
    second = replaced(two, second)
    first.until(lambda lines: len(steps(lines)) > made + 1)
    assert steps(first.lines)[made] == last + 1, "saved at the step that it stopped at"

    first.kill()  # the one that leads
    second.until(lambda lines: any("the first pod is gone" in line for line in lines))
    first = replaced(two, first)
    assert first.wait() == 0, first.log
    assert second.wait() == 0, second.log
    assert weights(two) == weights(one)
    assert curve(two) == curve(one)
    assert answers(two) == answers(one)
    assert result(two).metrics.held_out_loss == result(one).metrics.held_out_loss
    assert result(two).execution_id == first.execution


def test_two_pods_share_the_base_out_and_choose_the_best_weights(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    spec = {
        **SPEC,
        "training": {**SPEC["training"], "length": {"epochs": 2}, "parallelism": "FSDP"},
        "evaluation": {"intervalSteps": 2},
        "method": {"type": "QLoRA", "lora": {"rank": 4}},
    }
    one = prepare_job(s3, tmp_path / "one", tiny_model, **spec, compute={"gpusPerNode": 2})
    assert pod_of(one).start().wait() == 0
    two = prepare_job(s3, tmp_path / "two", tiny_model, **spec, compute=TWO_PODS)
    first, second = (pod.start() for pod in pods(two))
    assert (first.wait(), second.wait()) == (0, 0), first.log + second.log
    assert weights(two) == weights(one)
    assert curve(two) == curve(one)
    assert result(two).selected_step == result(one).selected_step


@pytest.mark.parametrize("alone", [0, 1])
def test_a_pod_that_has_a_place_gives_it_back_where_the_others_get_none(
    s3: Any, tiny_model: Path, tmp_path: Path, alone: int
) -> None:
    spec = {**SPEC, "recovery": {"placementTimeoutSeconds": 10}}
    job = prepare_job(s3, tmp_path, tiny_model, **spec, compute=TWO_PODS)
    waiting = pods(job)[alone].start()
    assert waiting.wait() == FAILURES[Reason.PODS_MISSING].exit_code, waiting.log
    assert waiting.report.reason == Reason.PODS_MISSING
    assert "rank" not in waiting.log
    words = "1 of 2 pods are not there: 1" if alone == 0 else "the first pod (localhost) cannot be reached"
    assert words in waiting.report.message


def test_a_pod_of_another_run_is_not_let_in(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    spec = {**SPEC, "recovery": {"placementTimeoutSeconds": 15}}
    job = prepare_job(s3, tmp_path / "a", tiny_model, **spec, compute=TWO_PODS)
    seed = {**spec, "training": {**SPEC["training"], "seed": 9}}
    other = prepare_job(s3, tmp_path / "b", tiny_model, **seed, compute=TWO_PODS)
    first = pods(job)[0].start()
    pod(other, first.environ[ENV_LEADER], 1).start()
    first.until(lambda lines: any("none of this run's pods" in line for line in lines))
    assert first.wait() == FAILURES[Reason.PODS_MISSING].exit_code
