"""One of four ranks in two pods dies, or hangs: all are gone within a minute, and what is told is what that rank died of."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.ends import watched
from tests.support.prepared import PreparedJob, prepare_job
from tests.support.train_container import ENV_STANDS_STILL, STANDS_STILL
from tests.support.train_process import TrainPod, kill_all
from tests.trainer.test_train_nodes import pods
from tests.trainer.test_train_resume import result

pytestmark = pytest.mark.timeout(600)
MOST_SECONDS = 60.0
"""For all ranks to stop when one is dead, or was found to hang."""
HUNG_SECONDS = 30
PER_POD = 2
SPEC: dict[str, Any] = {
    "method": {"lora": {"rank": 4}},
    "training": {"length": {"steps": 7}, "globalBatchSequences": 7, "microBatchSequences": 2, "parallelism": "FSDP"},
    "evaluation": {"generation": {"prompts": 0}},
    "recovery": {"hungTimeoutSeconds": HUNG_SECONDS},
    "compute": {"nodes": 2, "gpusPerNode": PER_POD},
}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    kill_all()


def until_one_stands_still(job: PreparedJob, rank: int, moment: str) -> list[TrainPod]:
    """Both pods, when the others can get no farther than to their next collective."""
    both = pods(job)
    for pod in both:
        pod.environ[ENV_STANDS_STILL] = f"{rank} {moment}"
        pod.start()
    both[rank // PER_POD].until(lambda lines: STANDS_STILL in lines)
    return both


def gone(both: list[TrainPod], seconds: float, kill: int | None = None) -> None:
    """Wait until every rank of both pods has ended, at most so long, after one was killed, if one is."""
    ranks = [pid for pod in both for pid in pod.workers()]
    with watched(ranks) as ends:
        if kill is not None:
            os.kill(ranks[kill], signal.SIGKILL)
        ends.all_within(seconds)


def test_a_dead_rank_stops_all_and_they_go_on_together(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    job = prepare_job(s3, tmp_path, tiny_model, **SPEC)
    both = until_one_stands_still(job, 3, "Training")
    gone(both, MOST_SECONDS, kill=3)
    assert [pod.wait() for pod in both] == [0, 0], both[0].log + both[1].log
    (restart,) = result(job).restarts
    assert restart.reason == "RankFailure"
    assert "the training process of rank 3 was ended by SIGKILL while Training" in restart.message


@pytest.mark.parametrize(("rank", "moment"), [(3, "Loading"), (0, "Uploading")])
def test_a_rank_that_dies_before_or_after_training_stops_all(
    s3: Any, tiny_model: Path, tmp_path: Path, rank: int, moment: str
) -> None:
    both = until_one_stands_still(prepare_job(s3, tmp_path, tiny_model, **SPEC), rank, moment)
    gone(both, MOST_SECONDS, kill=rank)
    told = f"the training process of rank {rank} was ended by SIGKILL while {moment}"
    both[0].until(lambda lines: any(told in line for line in lines), MOST_SECONDS)


def test_a_rank_that_hangs_in_another_pod_stops_all(s3: Any, tiny_model: Path, tmp_path: Path) -> None:
    """It is not known which of them hangs: the others, too, show no sign of life."""
    both = until_one_stands_still(prepare_job(s3, tmp_path, tiny_model, **SPEC), 3, "Training")
    gone(both, HUNG_SECONDS + MOST_SECONDS)
    told = re.compile(r"no sign of life for \d+ s while Training")
    both[0].until(lambda lines: any(told.search(line) for line in lines), MOST_SECONDS)
