"""The prepare stage: everything that can fail without a GPU fails here, and what training needs is made ready.

Reads from top to bottom: done before? → may the output be written, do trackers answer? → the model's shapes and tokenizer → every row → split →
upload, the result last. Where a plan is all that is asked for, nothing is stored.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import ValidationError

from finetune_api.answering import capped, is_gathered
from finetune_api.failures import Reason
from finetune_api.results import (
    PREPARE_RESULT,
    PREPARED_ADAPTER,
    PREPARED_HELD_OUT,
    PREPARED_PREVIEW,
    PREPARED_PROMPTS,
    PREPARED_TRAIN,
    TRAIN_RESULT,
    FileRecord,
    PrepareReport,
    PrepareResult,
    RunPlan,
    TrainedTokens,
    TrainResult,
)
from finetune_api.spec import Judge
from finetune_trainer.attempts import note_begin
from finetune_trainer.context import StageContext
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.lora_files import CONFIG, WEIGHTS
from finetune_trainer.pattern import check_on, compiled
from finetune_trainer.prepare.chat import load_tokenizer
from finetune_trainer.prepare.check import check_data
from finetune_trainer.prepare.finish import PREVIEW_ROWS, Prepared, finish, total_steps
from finetune_trainer.prepare.full_weights import choose_weights, trainable_shapes
from finetune_trainer.prepare.initial_adapter import InitialAdapter
from finetune_trainer.prepare.model import BaseModel, inspect_model
from finetune_trainer.prepare.plan import plan_run
from finetune_trainer.prepare.questions import check_questions, read_questions
from finetune_trainer.prepare.tasks import prepare_tasks
from finetune_trainer.prepare.trackers import check_trackers
from finetune_trainer.prepare.trained_tokens import counted, is_tied, warnings_of
from finetune_trainer.s3 import S3Store
from finetune_trainer.sources.ahead import fetch_or_leave
from finetune_trainer.stored import read_stored
from finetune_trainer.text import plural
from finetune_trainer.waiting import wait_until_available

R = TypeVar("R", PrepareResult, TrainResult)

log = logging.getLogger(__name__)

PREPARED_FILES = (PREPARED_TRAIN, PREPARED_HELD_OUT, PREPARED_PROMPTS, PREPARED_PREVIEW)
WRITE_TEST = "prepare/.write-test"


def run(ctx: StageContext) -> PrepareReport:
    """Prepare a job.

    Raises:
        StageError: with the reason; what somebody can mend (a Secret, an endpoint) is waited for instead.
    """
    plan_only = ctx.snapshot.spec.plan_only
    earlier = wait_until_available(ctx, lambda: find_earlier(ctx))
    if earlier.prepared is not None:
        log.info("prepared before: %s", plural(earlier.prepared.data.train_rows, "training row"))
        left = not plan_only and not earlier.trained and fetch_or_leave(ctx, earlier.prepared.model_commit)
        return report(earlier.prepared, earlier.trained, left)
    wait_until_available(ctx, lambda: check_output(ctx))
    of_trackers = wait_until_available(ctx, lambda: check_trackers(ctx))
    if not plan_only:
        wait_until_available(ctx, lambda: note_begin(ctx, ctx.workspace_store()))

    found = examine(ctx)
    model, prepared, planned = found.model, found.prepared, found.plan
    if planned is not None:
        log.info("%s", planned.summary)
    spec = ctx.snapshot.spec
    base_tokenizer = load_tokenizer(model.folder, spec.model.trust_remote_code) if spec.model.new_tokens else None
    tasks = prepare_tasks(ctx, model.tokenizer, base_tokenizer, model.config, gathered=is_gathered(spec, planned))
    for warning in (warnings := of_trackers + found.warnings + tasks.warnings):
        log.warning("%s", warning)

    full = ctx.snapshot.plan.method.full
    weights = None
    if full is not None and not plan_only:
        shapes = trainable_shapes(model.shapes, is_tied(model.shapes, model.config))
        weights = choose_weights(ctx, shapes, full, model.commit)
    files = [] if plan_only else upload(ctx, prepared, model.adapter, tasks.files)
    result = PrepareResult(
        snapshot_digest=ctx.snapshot.digest(),
        execution_id=ctx.execution_id,
        data=prepared.data,
        data_hash=prepared.data_hash,
        model_commit=model.commit,
        model_files=model.files,
        tokenizer_hash=model.tokenizer_hash,
        trained_tokens=found.tokens,
        trainable_parameters=model.parameters.trainable,
        total_parameters=model.parameters.total,
        total_steps=found.total_steps,
        plan=planned,
        initial_adapter=model.adapter.record if model.adapter is not None else None,
        weights=weights,
        task_datasets=tasks.datasets,
        files=files,
        warnings=warnings,
    )
    left = False
    if not plan_only:
        wait_until_available(ctx, lambda: ctx.workspace_store().put_model(PREPARE_RESULT, result))
        left = fetch_or_leave(ctx, model.commit)
    log.info(
        "%s checked: %s train, %s held out",
        plural(prepared.data.rows, "row"),
        prepared.data.train_rows,
        prepared.data.held_out_rows,
    )
    return report(result, earlier.trained, left)


@dataclass(frozen=True)
class Examined:
    """All that prepare finds out."""

    model: BaseModel
    prepared: Prepared
    plan: RunPlan | None
    total_steps: int
    warnings: list[str]
    tokens: TrainedTokens | None = None
    """Those whose rows of the embeddings are trained, and how often each occurs."""


def examine(ctx: StageContext, preview_rows: int = PREVIEW_ROWS, with_plan: bool = True) -> Examined:
    """Check model and data and plan the run. The prepared files lie in the work folder, and nothing is stored anywhere else.

    Args:
        preview_rows: how many of the first training rows are shown token by token.
        with_plan: False where the GPUs are not known, and would be in a cluster.

    Raises:
        StageError: whatever makes the job impossible.
    """
    generation = ctx.snapshot.spec.evaluation.generation
    search = compiled(generation.regex) if generation.regex is not None else None
    check_questions(generation.sources or [])
    check_judge(ctx.snapshot.spec.evaluation.judge)
    model = inspect_model(ctx)
    log.info("%s trainable of %s parameters", f"{model.parameters.trainable:,}", f"{model.parameters.total:,}")
    checked = check_data(ctx, model)
    questions = read_questions(ctx, model)
    prepared = finish(
        ctx.snapshot.spec, checked, model.tokenizer, model.renderer, ctx.work_dir / "prepared", questions, preview_rows,
        model.tokens.ids if model.tokens is not None else (),
    )  # fmt: skip
    tokens = counted(model.tokens, prepared.occurrences) if model.tokens is not None else None
    if search is not None:
        check_on(search, prepared.references)
    checked.spool.unlink(missing_ok=True)
    snapshot = ctx.snapshot if model.adapter is None else ctx.snapshot.with_lora(model.adapter.record.lora)
    planned = None
    if with_plan:
        planned = plan_run(snapshot.spec, ctx.snapshot.split, model, prepared.data, ctx.snapshot.node_gpus)
    steps = total_steps(ctx.snapshot.spec, prepared.data.train_rows)
    warnings = model.warnings + prepared.warnings + (warnings_of(tokens) if tokens is not None else [])
    warnings += capped(snapshot.spec, planned) if with_plan else []
    return Examined(model, prepared, planned, steps, warnings, tokens)


def check_judge(judge: Judge | None) -> None:
    """Whether its address is one. (Whether it answers is found out when it is asked: it may not be up yet.)

    Raises:
        StageError: InvalidConfig.
    """
    if judge is None:
        return
    try:
        httpx.URL(judge.endpoint_url)
    except httpx.InvalidURL as error:
        raise StageError(
            Reason.INVALID_CONFIG, f"evaluation.judge.endpointURL is no web address ({error}): {judge.endpoint_url}"
        ) from error


@dataclass(frozen=True)
class Earlier:
    """What an earlier execution of this very run left in the bucket."""

    prepared: PrepareResult | None
    trained: bool


def find_earlier(ctx: StageContext) -> Earlier:
    """Results count only if they are of this snapshot, and the prepared files only if they are all there."""
    store = ctx.workspace_store()
    digest = ctx.snapshot.digest()
    prepared = _result(store, PREPARE_RESULT, PrepareResult)
    if prepared is not None and (
        prepared.snapshot_digest != digest or not all(_present(store, f) for f in prepared.files)
    ):
        prepared = None
    trained = _result(store, TRAIN_RESULT, TrainResult)
    return Earlier(prepared, trained is not None and trained.snapshot_digest == digest)


def check_output(ctx: StageContext) -> None:
    """Write where results will be written: found out now, not after hours on a GPU.

    Raises:
        StageError: BucketNotFound, AccessDenied; StorageUnavailable, SecretMissing.
    """
    for store in (ctx.output_store(), ctx.workspace_store()):
        store.put_bytes(WRITE_TEST, b"")
        try:
            store.delete(WRITE_TEST)
        except StageError as error:
            if error.reason is not Reason.ACCESS_DENIED:
                raise
            log.info("credentials may write, but not delete: %s stays", store.uri(WRITE_TEST))


def upload(
    ctx: StageContext, prepared: Prepared, adapter: InitialAdapter | None, task_files: dict[str, Path]
) -> list[FileRecord]:
    """The prepared files, those of tasks, and the adapter that training goes on from, to the workspace."""
    ctx.reporter.report(activity="Uploading")
    paths = {name: prepared.folder / name for name in PREPARED_FILES} | task_files
    if adapter is not None:
        paths |= {f"{PREPARED_ADAPTER}/{name}": adapter.folder / name for name in (CONFIG, WEIGHTS)}
    total = sum(path.stat().st_size for path in paths.values())
    moved = ctx.reporter.transfer("upload", total)

    def send(name: str) -> FileRecord:
        return ctx.workspace_store().upload_file(paths[name], name, moved)

    return [wait_until_available(ctx, partial(send, name)) for name in paths]


def report(result: PrepareResult, trained: bool, fetch_pending: bool) -> PrepareReport:
    """What the operator is told."""
    return PrepareReport(
        data=result.data,
        data_hash=result.data_hash,
        model_commit=result.model_commit,
        trainable_parameters=result.trainable_parameters,
        total_parameters=result.total_parameters,
        total_steps=result.total_steps,
        plan=result.plan,
        trained=trained,
        fetch_pending=fetch_pending,
        warnings=result.warnings,
    )


def _result(store: S3Store, key: str, model: type[R]) -> R | None:
    try:
        return read_stored(store, key, model)
    except NotFound:
        return None
    except ValidationError as error:
        log.warning("%s is not readable and counts as missing: %s", store.uri(key), error)
        return None


def _present(store: S3Store, record: FileRecord) -> bool:
    try:
        return store.head(record.path).size == record.size
    except NotFound:
        return False
