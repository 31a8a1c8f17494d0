"""The train stage, top to bottom: set up, evaluate the base, train, save, verify."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError

from finetune_api.answering import answer_limits, is_offloaded, is_sharded
from finetune_api.base import ApiModel
from finetune_api.failures import GPU_PATIENCE_SECONDS
from finetune_api.progress import Split
from finetune_api.results import (
    ADAPTER_DIR,
    ANSWERS_FILE,
    BASE_EVALUATION,
    MODEL_DIR,
    TASK_REPLIES,
    TRAIN_RESULT,
    WEIGHTS_DIR,
    Answer,
    BaseEvaluation,
    FileRecord,
    QuantizedModule,
    TaskAnswers,
    TaskReplies,
    TrainMetrics,
    TrainReport,
    TrainResult,
    chosen,
)
from finetune_api.snapshot import Snapshot
from finetune_trainer import heartbeat, memory
from finetune_trainer.attempts import note_begin
from finetune_trainer.context import StageContext
from finetune_trainer.errors import NotFound
from finetune_trainer.s3 import S3Store
from finetune_trainer.stored import read_stored
from finetune_trainer.supervisor.run import SPLIT_FILE
from finetune_trainer.trackers.event_files import store_event_files
from finetune_trainer.trackers.tracking import Tracking
from finetune_trainer.train import evaluate, full, inputs, model, save, select, verify
from finetune_trainer.train.checkpoints import Checkpoints
from finetune_trainer.train.counted import must_be_as_counted
from finetune_trainer.train.device import Compute, pick_compute
from finetune_trainer.train.fit import Fit, History
from finetune_trainer.train.held_out_curve import overfitting
from finetune_trainer.train.initialization import initialize
from finetune_trainer.train.layer_norm import let_layer_norms_take_any_type
from finetune_trainer.train.owner import Owner, claim
from finetune_trainer.train.quantized import must_be_quantized, quantized_modules
from finetune_trainer.train.ranks import Ranks, join, leave
from finetune_trainer.train.rows import Rows, read_rows
from finetune_trainer.train.schedule import make_schedule
from finetune_trainer.train.sharded import adapter_to, load_sharded, ready_for_adapter
from finetune_trainer.train.split import choose_split, given_restarts, planned_split
from finetune_trainer.train.step_log import StepLog
from finetune_trainer.train.tasks import Tasks
from finetune_trainer.train.tokens import check_ids, make_room
from finetune_trainer.train.versions import library_versions
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)
T = TypeVar("T")

CLAIMED_FILE = "claimed"
"""On the pod's disk: this execution has taken the job over."""
CHECK_ROWS = 32
CHECK_TOKENS = 8192
"""Publish compares its own measurement with this stage's on the first held-out rows, at most so many of them and their tokens."""


class RankDone(ApiModel):
    """What another rank than the first reports: nothing."""


def run(ctx: StageContext) -> TrainReport | RankDone:
    """Train, and prove that what was saved is what was trained. The result is written last.

    Raises:
        StageError: NoGPU, UnsupportedModel, UnknownTargetModule, NonFiniteLoss, Diverged, VerificationFailed, Superseded and what
            stores raise.
        Interrupted: told to stop; what was trained is in the newest checkpoint.
    """
    with Tracking(ctx) as tracking:
        return train(ctx, tracking)


def train(ctx: StageContext, tracking: Tracking) -> TrainReport | RankDone:
    """What :func:`run` does, told to the job's trackers."""
    memory.map_large_blocks()
    ranks = join(ctx.snapshot.spec.training.use_cpu)
    began = ranks.share(lambda: begin_execution(ctx))
    if isinstance(began, TrainResult):
        log.info("this snapshot is trained already: nothing to do")
        return report(began) if ranks.first else RankDone()
    prepared, base_files = ranks.on_node(lambda: fetch_inputs(ctx))
    split = ranks.share(lambda: settle_split(ctx, prepared))
    spec, digest = ctx.snapshot.spec, ctx.snapshot.digest()
    snapshot = chosen(ctx.snapshot, prepared.result)
    output, workspace = ctx.output_store(), ctx.workspace_store()
    owner = Owner(workspace, ctx.execution_id, began)
    compute = pick_compute(spec.training)

    begin(ctx, "Loading")
    rows, held_out = read_rows(prepared.train), read_rows(prepared.held_out)
    rows = replace(rows, limit=split.max_sequence_tokens)
    tokenizer = model.load_base_tokenizer(base_files.folder, snapshot)
    used = verify.check_tokenizer_files(tokenizer, base_files.files, prepared.result)
    check_ids(tokenizer, prepared.result.trained_tokens)
    verify.check_tokenizer(tokenizer, prepared.prompts)
    pad_id = evaluate.pad_token_id(tokenizer)
    offloaded = is_offloaded(spec, prepared.result.plan)
    sharded = offloaded or (ranks.size > 1 and is_sharded(spec, prepared.result.plan))
    ranks = replace(ranks, sharded=sharded, offloaded=offloaded)
    base, quantized = load(base_files.folder, snapshot, compute, ranks)
    weights = prepared.result.weights
    if weights is not None:
        full.parameters_of(base, weights)  # refused before a GPU evaluates the base
    tokens = prepared.result.trained_tokens
    limits = answer_limits(spec, gathered=ranks.sharded)
    asked = [p for p in prepared.prompts if p.answered][: limits.prompts]
    answering = Answering(
        [p.input_ids for p in asked],
        compute,
        limits.new_tokens,
        spec.training.max_sequence_tokens,
        split.evaluation_divisor,
        ranks.agreed if ranks.sharded else None,
    )

    # Evaluate the base, once for all executions. Tasks it does as it is, with its own tokenizer.
    begin(ctx, "Evaluating")
    earlier = ranks.share(lambda: patiently(ctx, lambda: read_base_evaluation(ctx.snapshot, workspace)))
    replies = None
    if earlier is None and prepared.base_tasks is not None:
        own = model.load_tokenizer(base_files.folder, snapshot)
        replies = ranks.together(lambda: answering.task_replies(base, own, Tasks.read(prepared.base_tasks)))
    make_room(base, tokens, ranks)
    measured = earlier or evaluate_base(ctx, workspace, base, held_out, pad_id, answering, tokenizer, ranks, replies)
    release_memory()
    loss_base = evaluate.HeldOutLoss(measured.nll, measured.tokens, measured.right)
    log.info("held-out loss of the base: %.4f (perplexity %.2f)", loss_base.loss, loss_base.perplexity)

    # Train, from the newest checkpoint on.
    begin(ctx, "Training", held_out_loss=loss_base.loss)
    if ranks.sharded:
        ready_for_adapter(base)
    tuned: Any
    if weights is not None:
        tuned, trained_base = full.train_weights(base, weights, base_files.folder), {}
    else:
        token_ids = tokens.ids if tokens is not None else ()
        tuned = model.attach_adapter(base, snapshot, prepared.initial_adapter, token_ids)
        if ranks.offloaded:
            adapter_to(tuned, compute.device)
        trained_base = model.trained_base_weights(tuned)
    trainable = model.assert_trainables_float32(tuned)
    must_be_as_counted(
        trainable,
        prepared.result.trainable_parameters,
        base_files.folder,
        own_code=spec.model.trust_remote_code,
    )
    schedule = make_schedule(
        len(rows),
        spec.training.length,
        spec.training.global_batch_sequences,
        spec.training.seed,
        prepared.result.total_steps,
    )
    history = History(restarts=given_restarts())
    steps = StepLog(
        schedule, rows, lambda entry: report_step(ctx, entry) if ranks.first else None, spec.recovery.stop_on_divergence
    )
    fit = Fit(
        ctx=ctx,
        compute=replace(compute, keep_copies=weights is None),
        model=tuned,
        rows=rows,
        held_out=held_out,
        pad_id=pad_id,
        schedule=schedule,
        split=split,
        checkpoints=Checkpoints(
            workspace=workspace,
            local=ctx.work_dir / "checkpoints",
            owner=owner,
            snapshot_digest=digest,
            split=split,
            total_steps=schedule.steps,
            keep=spec.recovery.checkpoint.keep,
            world_size=ranks.size,
            shared=ranks.node is not None,
        ),
        steps=steps,
        history=history,
        first_weights=partial(
            initialize, tuned, snapshot, base_files.folder, rows, schedule, split, pad_id, compute, ranks
        ),
        ranks=ranks,
    )
    if ranks.first:
        tracking.follow(prepared.result, loss_base.loss, lambda: steps.steps, lambda: history.evaluations)
    fit.run()
    peaks = ranks.gather(compute.peak_bytes())
    if not ranks.sharded:
        leave()
        if not ranks.first:
            return RankDone()
        fit.ranks = ranks = Ranks()
    model.assert_trainables_float32(tuned)

    begin(ctx, "Evaluating")
    loss_trained, selected_step = select.evaluate_and_select(fit)
    ctx.reporter.report(held_out_loss=loss_trained.loss)
    metrics_lines = [
        loss_base.line(0),
        *sorted([*steps.steps, *fit.history.evaluations], key=lambda line: line["step"]),
    ]
    total, stopped = fit.last_step, fit.last_step < schedule.steps
    log.info("held-out loss after training: %.4f (perplexity %.2f)", loss_trained.loss, loss_trained.perplexity)

    # Save.
    begin(ctx, "Uploading")
    store, prefix = (output, ADAPTER_DIR) if weights is None else (workspace, WEIGHTS_DIR)
    stored = ranks.share(partial(store_trained, ctx, tuned, tokenizer, owner, store, prefix))

    # Verify: nothing of what was trained, or of the tokenizer, in memory is used from here on.
    begin(ctx, "Verifying")
    del fit, tokenizer
    if weights is None:
        base = model.detach_adapter(tuned, trained_base, compute.dtype)
    del tuned
    fetched = ranks.on_node(lambda: verify.fetch_back(ctx, store, stored, prefix, ctx.work_dir / "fetched"))
    tokenizer = model.load_tokenizer(fetched, snapshot)
    check_ids(tokenizer, tokens)
    verify.check_tokenizer(tokenizer, prepared.prompts)
    if weights is not None:
        del base
        release_memory()
        tuned = full.load_over(model.load_base(base_files.folder, snapshot, compute), fetched, weights)
    else:
        if ranks.sharded:
            ready_for_adapter(base)
        reloaded = verify.load_freshly(base, fetched)
        if ranks.offloaded:
            adapter_to(reloaded, compute.device)
        tuned = reloaded.get_base_model()
    pad_id = evaluate.pad_token_id(tokenizer)
    measure = partial(evaluate.held_out_loss, tuned, held_out, pad_id, compute, divisor=split.evaluation_divisor)
    loss_reloaded = ranks.together(measure)
    verification = verify.compare(loss_trained.loss, loss_reloaded.loss)
    tracking.finish(
        {
            "final/held_out_loss_base": loss_base.loss,
            "final/held_out_loss": loss_trained.loss,
            "final/perplexity": loss_trained.perplexity,
            "final/steps": total,
            **(
                {"final/adapter_uri": output.uri(ADAPTER_DIR)}
                if weights is None
                else {"final/model_uri": output.uri(MODEL_DIR)}
            ),
        }
    )
    answers = [
        Answer(row=p.row, prompt=p.prompt, reference=p.reference, base=b, tuned=t)
        for p, b, t in zip(asked, measured.answers, answering.answers(tuned, tokenizer), strict=True)
    ]
    tuned_replies = answering.task_replies(tuned, tokenizer, Tasks.read(prepared.tasks))
    peaks += ranks.gather(
        compute.peak_bytes()
    )  # evaluations and answers may take more than training, which the plan knows
    leave()
    if not ranks.first:
        return RankDone()

    event_files, event_runs = store_event_files(ctx, output, metrics_lines, prepared.result)
    check_rows = rows_to_check([held_out.length(i) for i in range(len(held_out))])
    result = TrainResult(
        snapshot_digest=digest,
        execution_id=ctx.execution_id,
        adapter_files=stored if weights is None else [],
        weights=weights,
        weights_files=stored if weights is not None else [],
        report_files=[*upload_reports(ctx, output, metrics_lines, answers), *event_files],
        metrics=TrainMetrics(
            held_out_loss_base=loss_base.loss,
            held_out_loss=loss_trained.loss,
            perplexity_base=loss_base.perplexity,
            perplexity=loss_trained.perplexity,
            token_accuracy_base=loss_base.token_accuracy,
            token_accuracy=loss_trained.token_accuracy,
            final_train_loss=steps.steps[-1]["loss"],
            steps=total,
            epochs=schedule.epoch_after(total - 1),
            early_stop_step=total if stopped else None,
            tokens=steps.tokens,
            tokens_per_second=steps.tokens / steps.seconds,
            train_seconds=steps.seconds,
            peak_gpu_bytes=max((peak for peak in peaks if peak is not None), default=None),
        ),
        verification=verification,
        base_files=base_files.files,
        quantized_modules=quantized,
        tokenizer_hash=used,
        base_dtype=str(compute.dtype).removeprefix("torch."),
        check_rows=check_rows,
        check_loss=loss_reloaded.first(check_rows),
        trainable_parameters=trainable,
        device=compute.name,
        versions=library_versions(),
        selected_step=selected_step,
        resumed_from_steps=history.resumed_from,
        split=split,
        restarts=history.restarts,
        checkpoint_blocked_seconds=history.blocked_seconds,
        warnings=[*history.warnings, *overfitting(history.evaluations, loss_base.loss, selected_step)],
        tracked=event_runs,
        task_replies=store_replies(ctx, workspace, measured.tasks, tuned_replies),
    )
    patiently(ctx, owner.check)
    patiently(ctx, lambda: workspace.put_model(TRAIN_RESULT, result))
    # Whoever is stopped while trackers are waited for has the result already.
    if runs := tracking.results():
        told = result.model_copy(update={"tracked": [*event_runs, *runs]})
        patiently(ctx, lambda: workspace.put_model(TRAIN_RESULT, told))
    return report(result)


def begin_execution(ctx: StageContext) -> int | TrainResult:
    """Take the job over, as the execution of that number; or what an earlier one finished. A missing GPU is told before anything is
    downloaded."""
    output, workspace, done = patiently(ctx, lambda: open_stores(ctx))
    if done is not None:
        return done
    claimed = ctx.work_dir / CLAIMED_FILE
    again = claimed.exists()
    if not again:
        note_begin(ctx, workspace)
    owner = patiently(ctx, lambda: claim(workspace, ctx.execution_id, again))
    claimed.touch()
    for store in (output, workspace):
        patiently(ctx, store.abort_orphans)
    compute = pick_compute(ctx.snapshot.spec.training)
    log.info("computing on %s in %s", compute.name, compute.dtype)
    return owner.number


def fetch_inputs(ctx: StageContext) -> tuple[inputs.Prepared, inputs.BaseFiles]:
    """The prepared data and the base, onto this node's disk."""
    begin(ctx, "Downloading")
    workspace = patiently(ctx, ctx.workspace_store)
    prepared = inputs.fetch_prepared(ctx, workspace)
    base_files = inputs.fetch_base(
        ctx,
        prepared.result.model_commit,
        prepared.result.model_files,
        limit_seconds=GPU_PATIENCE_SECONDS,
    )
    return prepared, base_files


def settle_split(ctx: StageContext, prepared: inputs.Prepared) -> Split:
    """How steps are cut, also for the supervisor and, where it is not as planned, for status."""
    planned, workspace = planned_split(ctx.snapshot, prepared.result), ctx.workspace_store()
    split = patiently(ctx, lambda: choose_split(planned, workspace))
    (ctx.work_dir / SPLIT_FILE).write_text(split.model_dump_json(by_alias=True))
    if split != planned:
        ctx.reporter.report(split=split)
    return split


def evaluate_base(
    ctx: StageContext,
    workspace: S3Store,
    base: Any,
    held_out: Rows,
    pad_id: int,
    answering: Answering,
    tokenizer: Any,
    ranks: Ranks,
    replies: TaskReplies | None,
) -> BaseEvaluation:
    """Measure the base, and leave that, with what it has answered to evaluation.tasks, for later executions."""

    def measure() -> BaseEvaluation:
        loss = evaluate.held_out_loss(base, held_out, pad_id, answering.compute, divisor=answering.divisor)
        return BaseEvaluation(
            snapshot_digest=ctx.snapshot.digest(),
            nll=loss.nll,
            tokens=loss.tokens,
            right=loss.right,
            answers=answering.answers(base, tokenizer),
            tasks=replies,
        )

    measured = ranks.together(measure)
    ranks.share(lambda: patiently(ctx, lambda: workspace.put_model(BASE_EVALUATION, measured)))
    return measured


def store_trained(
    ctx: StageContext, tuned: Any, tokenizer: Any, owner: Owner, store: S3Store, prefix: str
) -> list[FileRecord]:
    """The adapter, or the weights that were trained, into the bucket, unless another execution has taken over."""
    folder, is_adapter = ctx.work_dir / "trained", prefix == ADAPTER_DIR
    (save.save_adapter if is_adapter else full.save_weights)(tuned, tokenizer, folder)
    patiently(ctx, owner.check)
    return save.upload_adapter(ctx, folder, store) if is_adapter else save.upload_folder(ctx, folder, store, prefix)


def release_memory() -> None:
    """Trainer and its callbacks refer to each other: without a collection the trained model would still be there beside the fresh one."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    memory.give_back()


def load(folder: Path, snapshot: Snapshot, compute: Compute, ranks: Ranks) -> tuple[Any, list[QuantizedModule]]:
    """The base, all of it or this rank's part, and the records of its quantized weights."""
    if ranks.sharded:
        base, records = load_sharded(folder, snapshot, compute, ranks)
    else:
        base = model.load_base(folder, snapshot, compute)
        records = quantized_modules(base)
    if snapshot.plan.method.quantization is not None:
        must_be_quantized(records, base)
    if compute.device.type == "cpu":
        let_layer_norms_take_any_type(base)
    release_memory()
    return base, records


def begin(ctx: StageContext, activity: str, **fields: object) -> None:
    """What is done from now on, for the operator and the supervisor."""
    heartbeat.begin(activity)
    told = {**fields, "peak_memory_bytes": memory.peak_bytes()}
    ctx.reporter.report(activity=activity, **{k: v for k, v in told.items() if v is not None})


def patiently(ctx: StageContext, call: Callable[[], T]) -> T:
    """A store that is away is waited for as long as a stage that holds a GPU may."""
    return wait_until_available(ctx, call, limit_seconds=GPU_PATIENCE_SECONDS)


@dataclass(frozen=True)
class Answering:
    """The prompts that base and tuned model answer, and how."""

    prompts: list[list[int]]
    compute: Compute
    max_new_tokens: int
    context_tokens: int
    divisor: int
    all_say: Callable[[bool], bool] | None
    """Where ranks answer together: whether all of them say so."""

    def answers(self, causal_lm: Any, tokenizer: Any) -> list[str]:
        """Greedy answers."""
        return evaluate.greedy_answers(
            causal_lm,
            self.prompts,
            tokenizer,
            self.compute,
            self.max_new_tokens,
            self.context_tokens,
            self.divisor,
            self.all_say,
        )

    def task_replies(self, causal_lm: Any, tokenizer: Any, tasks: Tasks | None) -> TaskReplies | None:
        """Answers to evaluation.tasks, if there are any."""
        if tasks is None:
            return None
        return tasks.replies(causal_lm, tokenizer, self.compute, self.context_tokens, self.divisor, self.all_say)


def store_replies(
    ctx: StageContext, workspace: S3Store, base: TaskReplies | None, tuned: TaskReplies | None
) -> FileRecord | None:
    """What both answered to evaluation.tasks, for publish, which computes the scores."""
    if base is None or tuned is None:
        return None
    answers = TaskAnswers(base=base, tuned=tuned)
    return patiently(ctx, lambda: workspace.put_model(TASK_REPLIES, answers))


def read_base_evaluation(snapshot: Snapshot, workspace: S3Store) -> BaseEvaluation | None:
    """What an earlier execution measured."""
    try:
        found = workspace.get_model(BASE_EVALUATION, BaseEvaluation)
    except (NotFound, ValidationError):
        return None
    return found if found.snapshot_digest == snapshot.digest() else None


def open_stores(ctx: StageContext) -> tuple[S3Store, S3Store, TrainResult | None]:
    """Output, workspace, and what an earlier execution finished.

    Opened anew at every try: the Secret may be missing still, or hold an endpoint that somebody mends.
    """
    output, workspace = ctx.output_store(), ctx.workspace_store()
    return output, workspace, finished_result(ctx, output, workspace)


def finished_result(ctx: StageContext, output: S3Store, workspace: S3Store) -> TrainResult | None:
    """The result of an earlier execution of this snapshot, if its files are all there."""
    try:
        result = read_stored(workspace, TRAIN_RESULT, TrainResult)
        if result.snapshot_digest != ctx.snapshot.digest():
            return None
        whole = all(output.head(f.path).size == f.size for f in (*result.adapter_files, *result.report_files))
        replies = [result.task_replies] if result.task_replies is not None else []
        whole = whole and all(workspace.head(f.path).size == f.size for f in (*result.weights_files, *replies))
    except (NotFound, ValidationError):
        return None
    return result if whole else None


def upload_reports(
    ctx: StageContext, output: S3Store, metrics: list[dict[str, Any]], answers: list[Answer]
) -> list[FileRecord]:
    """``reports/metrics.jsonl`` and ``reports/answers.json``."""
    data = json.dumps([a.to_json_dict() for a in answers], ensure_ascii=False, indent=1).encode()
    record = wait_until_available(ctx, lambda: output.put_bytes(ANSWERS_FILE, data), limit_seconds=GPU_PATIENCE_SECONDS)
    return [save.upload_metrics(ctx, metrics, output), record]


def rows_to_check(lengths: list[int]) -> int:
    """How many of the first rows fit one batch of CHECK_TOKENS, padding included; at least one."""
    count = 0
    while count < min(CHECK_ROWS, len(lengths)) and max(lengths[: count + 1]) * (count + 1) <= CHECK_TOKENS:
        count += 1
    return max(1, count)


def report_step(ctx: StageContext, entry: dict[str, float]) -> None:
    """One step's numbers to the operator and the log."""
    fields = ("step", "total_steps", "epoch", "loss", "learning_rate", "tokens_per_second", "eta_seconds")
    ctx.reporter.report(**{name: entry[name] for name in fields})
    log.info(
        "step %d/%d  loss %.4f  lr %.2e  %.0f tokens/s",
        entry["step"], entry["total_steps"], entry["loss"], entry["learning_rate"], entry["tokens_per_second"],
    )  # fmt: skip


def report(result: TrainResult) -> TrainReport:
    """What the operator needs of a result."""
    return TrainReport(
        metrics=result.metrics,
        verification=result.verification,
        adapter_bytes=sum(f.size for f in result.adapter_files),
        device=result.device,
        selected_step=result.selected_step,
    )
