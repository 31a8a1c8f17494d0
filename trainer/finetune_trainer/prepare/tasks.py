"""The requests of ``evaluation.tasks``, made before a GPU is asked for: their data are fetched, and what models are asked is tokenised."""

from __future__ import annotations

import logging
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from finetune_api.answering import positions_of, prompt_room
from finetune_api.failures import Reason
from finetune_api.names import task_slot
from finetune_api.results import (
    IGNORED,
    PREPARED_TASK_DATA,
    PREPARED_TASK_PROMPTS,
    PREPARED_TASK_ROWS,
    TaskPrompt,
)
from finetune_api.spec import EvaluationTask
from finetune_api.uris import S3Location, parse_uri
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.store import ROW_GROUP_ROWS, SCHEMA, RowWriter, lists
from finetune_trainer.s3 import connect
from finetune_trainer.tasks.child import FIELD, run_harness
from finetune_trainer.tasks.protocol import ASKED, REQUESTS, AskedTask, Command, Requests
from finetune_trainer.text import plural
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)

OWN_FILES = (".yaml", ".json", ".jsonl", ".csv", ".parquet")
"""No code: a task's YAML may name Python functions, but brings none."""
MOST_BYTES = 4 << 30
"""Of all tasks' data, which later stages fetch."""
LEAST_PROMPT = 16
"""Tokens: what is left of a prompt that is cut to less asks nothing."""
ASKED_TASKS = TypeAdapter(list[AskedTask])
PROMPTS = TypeAdapter(list[TaskPrompt])


def prepare_tasks(
    ctx: StageContext, tokenizer: Any, config: Mapping[str, Any], *, gathered: bool
) -> tuple[dict[str, Path], list[str]]:
    """The prepared files by name, and what is worth knowing of them; none where no task is asked for.

    Args:
        config: the model's config.json.
        gathered: whether no GPU holds the whole base.

    Raises:
        StageError: InvalidConfig, DatasetNotFound, AccessDenied, BucketNotFound.
    """
    asked = ctx.snapshot.spec.evaluation.tasks
    if not asked:
        return {}, []
    ctx.reporter.report(activity="Downloading")
    folder = ctx.work_dir / "tasks"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    wait_until_available(ctx, lambda: _make_requests(ctx, asked, folder))
    requests = Requests.model_validate_json((folder / REQUESTS).read_bytes())
    if gathered and requests.generated:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{FIELD}: {plural(len(requests.generated), 'request')} to generate an answer, and no GPU holds the whole base: each token gathers it. "
            "Leave tasks that generate out (those that compare likelihoods are answered), or ask for GPUs that hold the base, or for type: QLoRA.",
        )
    files = {name: ctx.work_dir / name for name in (PREPARED_TASK_ROWS, PREPARED_TASK_PROMPTS, PREPARED_TASK_DATA)}
    limit = ctx.snapshot.spec.training.max_sequence_tokens
    cut = write_rows(files[PREPARED_TASK_ROWS], requests, tokenizer, limit)
    prompts = [
        TaskPrompt(input_ids=encoded(tokenizer, g.context), max_new_tokens=g.max_new_tokens, until=list(g.until))
        for g in requests.generated
    ]
    files[PREPARED_TASK_PROMPTS].write_bytes(PROMPTS.dump_json(prompts, by_alias=True))
    pack(folder, files[PREPARED_TASK_DATA])
    cut += cut_prompts(prompts, positions_of(config), limit)
    count = len(requests.continuations) + len(requests.generated)
    log.info("%s: %s", FIELD, plural(count, "request"))
    return files, [
        f"{plural(cut, 'request')} of {count:,} of {FIELD} longer than training.maxSequenceTokens ({limit:,}), or than the model's positions leave room for beside the answer: their beginning is left out"
    ] if cut else []


def cut_prompts(prompts: Sequence[TaskPrompt], positions: int | None, limit: int) -> int:
    """How many of them do not fit as a whole.

    Raises:
        StageError: InvalidConfig, where hardly anything of one would be left.
    """
    cut = 0
    for prompt in prompts:
        room = prompt_room(positions, prompt.max_new_tokens, limit)
        if len(prompt.input_ids) > room and positions is not None and positions - prompt.max_new_tokens < LEAST_PROMPT:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"{FIELD}: a prompt of {len(prompt.input_ids):,} tokens is to be answered with up to {prompt.max_new_tokens:,}, and the model has "
                f"{positions:,} positions: less than {LEAST_PROMPT} are left for the prompt. Leave the task out, or ask for less in a task of "
                "your own (generation_kwargs.max_gen_toks).",
            )
        cut += len(prompt.input_ids) > room
    return cut


def _make_requests(ctx: StageContext, tasks: Sequence[EvaluationTask], folder: Path) -> None:
    asked = []
    for index, task in enumerate(tasks):
        own = _fetch(ctx, task, index, folder) if task.uri is not None else None
        asked.append(AskedTask(name=task.name, folder=own, limit=task.limit, few_shot=task.few_shot))
    (folder / ASKED).write_bytes(ASKED_TASKS.dump_json(asked))
    token, endpoint = _hub(ctx, tasks)
    run_harness(Command.REQUESTS, folder, token=token, endpoint=endpoint)


def _hub(ctx: StageContext, tasks: Sequence[EvaluationTask]) -> tuple[str | None, str | None]:
    """Token and endpoint for lm-eval's own tasks: those of the first that names a Secret, one for all."""
    known = [(index, task) for index, task in enumerate(tasks) if task.uri is None]
    if not known:
        return None, None
    index, task = next((pair for pair in known if pair[1].secret_ref is not None), known[0])
    return ctx.credentials(task_slot(index), task).hub()


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


def write_rows(path: Path, requests: Requests, tokenizer: Any, limit: int) -> int:
    """A row for each continuation, which alone is learned of it; how many were cut to ``limit`` tokens."""
    cut, rows = 0, []
    with RowWriter(path, SCHEMA) as writer:
        for number, request in enumerate(requests.continuations):
            context, continuation = encoded_pair(tokenizer, request.context, request.continuation)
            ids = [*context, *continuation][-limit:]
            cut += len(context) + len(continuation) > limit
            read = max(1, len(ids) - len(continuation))  # nothing predicts the first token
            rows.append((number, ids, read))
            if len(rows) == ROW_GROUP_ROWS:
                writer.write(_table(rows))
                rows = []
        if rows:
            writer.write(_table(rows))
    return cut


def _table(rows: Sequence[tuple[int, list[int], int]]) -> pa.Table:
    """Of number, ids and how many of them are only read."""
    ids = [np.array(tokens, np.int32) for _, tokens, _ in rows]
    labels = [np.where(np.arange(len(tokens)) < read, IGNORED, tokens).astype(np.int32) for _, tokens, read in rows]
    return pa.table(
        {
            "row": [number for number, _, _ in rows],
            "source": [f"task:{number}" for number, _, _ in rows],
            "input_ids": lists(ids),
            "labels": lists(labels),
            "prompt_tokens": [read for _, _, read in rows],
        }
    )


def encoded_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As lm-eval's TemplateLM: white space at the context's end belongs to the continuation, which is what the whole has more."""
    if not context:
        first = prefix_token(tokenizer)
        ids = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        return ([first], ids) if first != ids[0] else (ids[:1], ids[1:])
    bare = context.rstrip()
    before = encoded(tokenizer, bare)
    return before, encoded(tokenizer, context + continuation)[len(before) :]


def encoded(tokenizer: Any, text: str) -> list[int]:
    """As lm-eval's HFLM: with the special tokens that the tokenizer adds, unless the text begins with BOS itself."""
    begun = text.startswith(tokenizer.decode(prefix_token(tokenizer)))
    return list(tokenizer(text, **({"add_special_tokens": False} if begun else {}))["input_ids"])


def prefix_token(tokenizer: Any) -> int:
    """BOS, or EOS where there is none."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)


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
