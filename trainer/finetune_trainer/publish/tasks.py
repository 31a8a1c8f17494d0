"""Scores of ``evaluation.tasks``: lm-eval computes them of what both models have answered, without GPU and without the Hub."""

from __future__ import annotations

import logging
import shutil
import tarfile
from pathlib import Path

from pydantic import TypeAdapter

from finetune_api.results import PREPARED_TASK_DATA, PrepareResult, TrainResult
from finetune_api.scores import TaskScore
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.publish.whole import fetch_stored
from finetune_trainer.s3 import S3Store
from finetune_trainer.tasks.child import run_harness
from finetune_trainer.tasks.protocol import REPLIES, SCORES, Command, Score
from finetune_trainer.train.inputs import must_equal
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)

PAIRS = TypeAdapter(list[tuple[Score, Score]])


def task_scores(
    ctx: StageContext, prepared: PrepareResult, trained: TrainResult, workspace: S3Store
) -> tuple[list[TaskScore], list[str]]:
    """All numbers of all tasks, and what is worth knowing of them. A task that cannot be scored costs its scores, not the job.

    Raises:
        StageError: VerificationFailed, for files that are not what was stored.
    """
    if trained.task_replies is None:
        return [], []
    folder = ctx.work_dir / "tasks"
    wait_until_available(ctx, lambda: _fetch(ctx, prepared, trained, workspace, folder))
    try:
        run_harness(Command.SCORES, folder)
    except StageError as error:
        log.warning("%s", error.message)
        return [], [f"the tasks are not scored: {error.message}"]
    return [side_by_side(base, tuned) for base, tuned in PAIRS.validate_json((folder / SCORES).read_bytes())], []


def _fetch(ctx: StageContext, prepared: PrepareResult, trained: TrainResult, workspace: S3Store, folder: Path) -> None:
    """What lm-eval needs, each file with the hash that it was written with."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    packed = ctx.work_dir / "tasks.tar"
    data = next(record for record in prepared.files if record.path == PREPARED_TASK_DATA)
    assert trained.task_replies is not None
    for record, path in ((data, packed), (trained.task_replies, folder / REPLIES)):
        must_equal(fetch_stored(workspace, record, path), record, workspace.uri(record.path))
    with tarfile.open(packed) as tar:
        tar.extractall(folder, filter="data")
    packed.unlink()


def side_by_side(base: Score, tuned: Score) -> TaskScore:
    """The same number of both models."""
    return TaskScore(
        task=base.task,
        metric=base.metric,
        filter=base.filter,
        part_of=base.part_of,
        documents=base.documents,
        few_shot=base.few_shot,
        higher_is_better=base.higher_is_better,
        base=base.value,
        base_stderr=base.stderr,
        tuned=tuned.value,
        tuned_stderr=tuned.stderr,
    )


def shortly(scores: list[TaskScore]) -> list[TaskScore]:
    """The first number of each task or group asked for."""
    first: dict[str, TaskScore] = {}
    for score in scores:
        if score.part_of is None:
            first.setdefault(score.task, score)
    return list(first.values())


def task_rows(scores: list[TaskScore]) -> list[tuple[str, str, str, str]]:
    """Task, number, base and tuned of all that was asked for, for people; parts of groups stand in metrics.json."""
    return [
        (_name(score), score.metric, _shown(score.base, score.base_stderr), _shown(score.tuned, score.tuned_stderr))
        for score in scores
        if score.part_of is None
    ]


def _name(score: TaskScore) -> str:
    told = [
        *([f"{score.few_shot} examples"] if score.few_shot else []),
        *([f"{score.documents:,} documents"] if score.documents else []),
        *([score.filter] if score.filter != "none" else []),
    ]
    return f"{score.task} ({', '.join(told)})" if told else score.task


def _shown(value: float, error: float | None) -> str:
    return f"{value:.4f}" if error is None else f"{value:.4f} ± {error:.4f}"
