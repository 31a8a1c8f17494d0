"""The requests of ``evaluation.tasks``, made before a GPU is asked for: their data are fetched, and what models are asked is tokenised."""

from __future__ import annotations

import logging
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.answering import positions_of
from finetune_api.failures import Reason
from finetune_api.names import task_slot
from finetune_api.results import (
    PREPARED_BASE_TASK_PROMPTS,
    PREPARED_BASE_TASK_ROWS,
    PREPARED_TASK_DATA,
    PREPARED_TASK_PROMPTS,
    PREPARED_TASK_ROWS,
    TaskDataset,
)
from finetune_api.spec import EvaluationTask
from finetune_api.uris import S3Location, parse_uri
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.task_rows import write_requests
from finetune_trainer.s3 import connect
from finetune_trainer.tasks.child import FIELD, Hub, run_harness
from finetune_trainer.tasks.protocol import ASKED, CACHE, REQUESTS, Asked, AskedTask, Command, Generated, Requests
from finetune_trainer.text import plural
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)

OWN_FILES = (".yaml", ".json", ".jsonl", ".csv", ".parquet")
"""No code: a task's YAML may name Python functions, but brings none."""
RAW_DATA = ("hub", "datasets/downloads")
"""Below the cache: what datasets has made its own files of, and needs no more."""
MOST_BYTES = 4 << 30
"""Of all tasks' data, which later stages fetch."""
MOST_NEW_TOKENS = 1 << 20
"""That all tasks together may have each of the two models generate: half an hour at 600 tokens a second."""
TOLD_NEW_TOKENS = 1 << 16
"""From here on a job is told."""


@dataclass(frozen=True)
class PreparedTasks:
    """What prepare makes of evaluation.tasks."""

    files: dict[str, Path] = field(default_factory=dict)
    """By name; none where no task is asked for, or all are left out."""
    datasets: list[TaskDataset] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def prepare_tasks(
    ctx: StageContext, tokenizer: Any, base_tokenizer: Any, config: Mapping[str, Any], *, gathered: bool
) -> PreparedTasks:
    """Fetch the data, make the requests without the Hub, tokenise them.

    Args:
        base_tokenizer: the base model's own, by which the base is asked, where ``tokenizer`` has new tokens; else None.
        config: the model's config.json.
        gathered: whether no GPU holds the whole base.

    Raises:
        StageError: InvalidConfig, DatasetNotFound, AccessDenied, BucketNotFound.
    """
    asked = ctx.snapshot.spec.evaluation.tasks
    if not asked:
        return PreparedTasks()
    ctx.reporter.report(activity="Downloading")
    folder = ctx.work_dir / "tasks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wait_until_available(ctx, lambda: _fetch_data(ctx, asked, folder, generates=not gathered))
    for raw in RAW_DATA:
        shutil.rmtree(folder / CACHE / raw, ignore_errors=True)
    run_harness(Command.REQUESTS, folder)
    requests = Requests.model_validate_json((folder / REQUESTS).read_bytes())
    warnings = left_out(requests.left_out)
    if len(requests.left_out) == len(asked):
        return PreparedTasks(warnings=warnings)
    warnings += generated_tokens(requests.generated)
    log.info("%s: %s", FIELD, plural(len(requests.continuations) + len(requests.generated), "request"))
    files = {name: ctx.work_dir / name for name in (PREPARED_TASK_ROWS, PREPARED_TASK_PROMPTS, PREPARED_TASK_DATA)}
    positions, limit = positions_of(config), ctx.snapshot.spec.training.max_sequence_tokens
    rows, prompts = files[PREPARED_TASK_ROWS], files[PREPARED_TASK_PROMPTS]
    cut = write_requests(requests, tokenizer, rows, prompts, positions, limit)
    if base_tokenizer is not None:
        files |= {name: ctx.work_dir / name for name in (PREPARED_BASE_TASK_ROWS, PREPARED_BASE_TASK_PROMPTS)}
        rows, prompts = files[PREPARED_BASE_TASK_ROWS], files[PREPARED_BASE_TASK_PROMPTS]
        cut = max(cut, write_requests(requests, base_tokenizer, rows, prompts, positions, limit))
    pack(folder, files[PREPARED_TASK_DATA])
    if cut:
        count = len(requests.continuations) + len(requests.generated)
        warnings.append(
            f"{plural(cut, 'request')} of {count:,} of {FIELD} longer than training.maxSequenceTokens ({limit:,}), or than the model's positions "
            "leave room for beside the answer: their beginning is left out"
        )
    return PreparedTasks(files, requests.datasets, warnings)


def left_out(names: Sequence[str]) -> list[str]:
    """A warning of tasks that are not done, if there are any."""
    if not names:
        return []
    return [
        f"{FIELD}: {', '.join(names)} left out: they have answers generated, and no GPU holds the whole base, so that each token would gather it. Ask for "
        "GPUs that hold the base, or for type: QLoRA; tasks that compare likelihoods are done"
    ]


def generated_tokens(requests: Sequence[Generated]) -> list[str]:
    """A warning where it takes long to answer them all.

    Raises:
        StageError: InvalidConfig, beyond MOST_NEW_TOKENS.
    """
    most = sum(request.max_new_tokens for request in requests)
    told = f"{plural(len(requests), 'answer')} with up to {most:,} tokens in all are generated by each model"
    if most > MOST_NEW_TOKENS:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{FIELD}: {told}, and {MOST_NEW_TOKENS:,} tokens is the most: lower limit (of a group it counts for each of its tasks), or leave tasks out.",
        )
    log.info("%s: %s", FIELD, told)
    return [f"{FIELD}: {told}, while a GPU is held; limit makes it fewer"] if most > TOLD_NEW_TOKENS else []


def _fetch_data(ctx: StageContext, tasks: Sequence[EvaluationTask], folder: Path, *, generates: bool) -> None:
    asked = []
    for index, task in enumerate(tasks):
        own = _fetch(ctx, task, index, folder) if task.uri is not None else None
        asked.append(AskedTask(name=task.name, folder=own, limit=task.limit, few_shot=task.few_shot))
    (folder / ASKED).write_text(Asked(tasks=asked, generates=generates).model_dump_json(by_alias=True))
    run_harness(Command.DATA, folder, _hub(ctx, tasks))


def _hub(ctx: StageContext, tasks: Sequence[EvaluationTask]) -> Hub:
    """Token and mirror, one for all: those of the first of lm-eval's own tasks that names a Secret; else of the first task whose Secret has them,
    as a task of one's own may read the Hub too."""
    credentials = [ctx.credentials(task_slot(index), task) for index, task in enumerate(tasks)]
    folder = ctx.work_dir / "scratch"
    known = [found for found, task in zip(credentials, tasks, strict=True) if task.uri is None]
    for found in sorted(known, key=lambda each: each.folder is None)[:1]:
        return Hub(*found.hub(), found.ca_bundle(folder))
    for found in credentials:
        values = found.values()
        if values.keys() & {"HF_TOKEN", "HF_ENDPOINT"}:
            return Hub(values.get("HF_TOKEN"), values.get("HF_ENDPOINT"), found.ca_bundle(folder))
    return Hub()


def _fetch(ctx: StageContext, task: EvaluationTask, index: int, folder: Path) -> str:
    """A task's own files, into a folder of that name."""
    assert task.uri is not None
    location = parse_uri(task.uri)
    assert isinstance(location, S3Location)  # the spec's pattern allows nothing else
    slot = task_slot(index)
    store = connect(location, ctx.credentials(slot, task), ctx.work_dir / "scratch")
    keys = sorted(info.key for info in store.list() if info.key.endswith(OWN_FILES) and ".." not in info.key.split("/"))
    if not any(key.endswith(".yaml") for key in keys):
        raise StageError(Reason.DATASET_NOT_FOUND, f"{FIELD}[{index}]: there is no .yaml file at {task.uri}")
    for key in keys:
        path = folder / slot / key
        path.parent.mkdir(parents=True, exist_ok=True)
        store.download_file(key, path)
    return slot


def pack(folder: Path, path: Path) -> None:
    """The folder as one file, from which scores are computed later, without the Hub.

    Raises:
        StageError: InvalidConfig, for more than MOST_BYTES.
    """
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    if size > MOST_BYTES:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{FIELD}: their data take {size / 2**30:.1f} GiB, and {MOST_BYTES >> 30} GiB are kept at most: ask for fewer.",
        )
    with tarfile.open(path, "w") as tar:
        tar.add(folder, arcname=".")
