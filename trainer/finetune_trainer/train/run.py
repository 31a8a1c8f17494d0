"""The train stage, top to bottom: set up, evaluate the base, train, save, verify."""

from __future__ import annotations

import json
import logging
from typing import Any

from pydantic import ValidationError

from finetune_api.results import ANSWERS_FILE, TRAIN_RESULT, Answer, FileRecord, TrainMetrics, TrainReport, TrainResult
from finetune_trainer.attempts import note_begin
from finetune_trainer.context import StageContext
from finetune_trainer.errors import NotFound
from finetune_trainer.s3 import S3Store
from finetune_trainer.stored import read_stored
from finetune_trainer.train import evaluate, inputs, model, save, verify
from finetune_trainer.train.device import pick_compute
from finetune_trainer.train.quantized import quantized_modules
from finetune_trainer.train.rows import read_rows
from finetune_trainer.train.schedule import make_schedule
from finetune_trainer.train.trainer import LoraTrainer, StepLog, training_arguments
from finetune_trainer.train.versions import library_versions
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)

CHECK_ROWS = 32
CHECK_TOKENS = 8192
"""Publish compares its own measurement with this stage's on the first held-out rows, at most so many of them and their tokens."""


def run(ctx: StageContext) -> TrainReport:
    """Train, and prove that what was saved is what was trained. The result is written last.

    Raises:
        StageError: NoGPU, UnsupportedModel, UnknownTargetModule, NonFiniteLoss, VerificationFailed and what stores raise.
    """
    output, workspace, done = wait_until_available(
        ctx, lambda: open_stores(ctx), limit_seconds=inputs.GPU_PATIENCE_SECONDS
    )
    if done is not None:
        log.info("this snapshot is trained already: nothing to do")
        return report(done)
    note_begin(ctx, workspace)

    # Set up. A missing GPU is told before anything is downloaded.
    snapshot, spec = ctx.snapshot, ctx.snapshot.spec
    compute = pick_compute(spec.training.use_cpu)
    log.info("computing on %s in %s", compute.name, compute.dtype)
    ctx.reporter.report(activity="Downloading")
    prepared = inputs.fetch_prepared(ctx, workspace)
    base_files = inputs.fetch_base(
        ctx,
        prepared.result.model_commit,
        prepared.result.model_files,
        limit_seconds=inputs.GPU_PATIENCE_SECONDS,
    )

    ctx.reporter.report(activity="Loading")
    rows, held_out = read_rows(prepared.train), read_rows(prepared.held_out)
    tokenizer = model.load_tokenizer(base_files.folder, snapshot)
    used = verify.check_tokenizer_files(tokenizer, base_files.files, prepared.result)
    verify.check_tokenizer(tokenizer, prepared.prompts)
    pad_id = evaluate.pad_token_id(tokenizer)
    base = model.load_base(base_files.folder, snapshot, compute)
    quantized = quantized_modules(base)
    asked = prepared.prompts[: spec.evaluation.generation.prompts]
    prompt_ids = [p.input_ids for p in asked]
    max_new_tokens, limit = spec.evaluation.generation.max_new_tokens, spec.training.max_sequence_tokens

    # Evaluate the base.
    ctx.reporter.report(activity="Evaluating")
    loss_base = evaluate.held_out_loss(base, held_out, pad_id, compute)
    answers_base = evaluate.greedy_answers(base, prompt_ids, tokenizer, compute, max_new_tokens, limit)
    metrics_lines: list[dict[str, Any]] = [{"step": 0, "held_out_loss": loss_base.loss}]
    log.info("held-out loss of the base: %.4f (perplexity %.2f)", loss_base.loss, loss_base.perplexity)

    # Train.
    ctx.reporter.report(activity="Training", held_out_loss=loss_base.loss)
    peft_model = model.attach_adapter(base, snapshot)
    trained_base = model.trained_base_weights(peft_model)
    schedule = make_schedule(
        len(rows),
        spec.training.length,
        spec.training.global_batch_sequences,
        spec.training.seed,
        prepared.result.total_steps,
    )
    steps = StepLog(schedule, rows, lambda entry: report_step(ctx, entry))
    trainer = LoraTrainer(
        model=peft_model,
        args=training_arguments(snapshot, compute, schedule.steps, ctx.work_dir / "trainer"),
        rows=rows,
        schedule=schedule,
        micro_batch=snapshot.plan.micro_batch_sequences,
        pad_id=pad_id,
        compute=compute,
        callbacks=[steps],
    )
    trainable = model.assert_trainables_float32(peft_model)
    trainer.train()
    seconds = steps.seconds
    model.assert_trainables_float32(peft_model)
    metrics_lines += steps.steps

    ctx.reporter.report(activity="Evaluating")
    loss_trained = evaluate.held_out_loss(peft_model.get_base_model(), held_out, pad_id, compute)
    ctx.reporter.report(held_out_loss=loss_trained.loss)
    metrics_lines.append({"step": schedule.steps, "held_out_loss": loss_trained.loss})
    log.info("held-out loss after training: %.4f (perplexity %.2f)", loss_trained.loss, loss_trained.perplexity)

    # Save.
    ctx.reporter.report(activity="Uploading")
    adapter_folder = ctx.work_dir / "adapter"
    save.save_adapter(peft_model, tokenizer, adapter_folder)
    adapter_files = save.upload_adapter(ctx, adapter_folder, output)

    # Verify: nothing of the trained adapter or the tokenizer in memory is used from here on.
    ctx.reporter.report(activity="Verifying")
    del trainer, tokenizer
    base = model.detach_adapter(peft_model, trained_base, compute.dtype)
    del peft_model
    fetched = verify.fetch_back(ctx, output, adapter_files, ctx.work_dir / "fetched")
    tokenizer = model.load_tokenizer(fetched, snapshot)
    verify.check_tokenizer(tokenizer, prepared.prompts)
    tuned = verify.load_freshly(base, fetched).get_base_model()
    loss_reloaded = evaluate.held_out_loss(tuned, held_out, evaluate.pad_token_id(tokenizer), compute)
    verification = verify.compare(loss_trained.loss, loss_reloaded.loss)
    answers_tuned = evaluate.greedy_answers(tuned, prompt_ids, tokenizer, compute, max_new_tokens, limit)
    answers = [
        Answer(row=p.row, prompt=p.prompt, reference=p.reference, base=b, tuned=t)
        for p, b, t in zip(asked, answers_base, answers_tuned, strict=True)
    ]

    check_rows = rows_to_check([held_out.length(i) for i in range(len(held_out))])
    result = TrainResult(
        snapshot_digest=snapshot.digest(),
        execution_id=ctx.execution_id,
        adapter_files=adapter_files,
        report_files=upload_reports(ctx, output, metrics_lines, answers),
        metrics=TrainMetrics(
            held_out_loss_base=loss_base.loss,
            held_out_loss=loss_trained.loss,
            perplexity_base=loss_base.perplexity,
            perplexity=loss_trained.perplexity,
            final_train_loss=steps.steps[-1]["loss"],
            steps=schedule.steps,
            epochs=schedule.epoch_after(schedule.steps - 1),
            tokens=steps.tokens,
            tokens_per_second=steps.tokens / seconds,
            train_seconds=seconds,
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
    )
    wait_until_available(
        ctx, lambda: workspace.put_model(TRAIN_RESULT, result), limit_seconds=inputs.GPU_PATIENCE_SECONDS
    )
    return report(result)


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
    except (NotFound, ValidationError):
        return None
    return result if whole else None


def upload_reports(
    ctx: StageContext, output: S3Store, metrics: list[dict[str, Any]], answers: list[Answer]
) -> list[FileRecord]:
    """``reports/metrics.jsonl`` and ``reports/answers.json``."""
    data = json.dumps([a.to_json_dict() for a in answers], ensure_ascii=False, indent=1).encode()
    record = wait_until_available(
        ctx, lambda: output.put_bytes(ANSWERS_FILE, data), limit_seconds=inputs.GPU_PATIENCE_SECONDS
    )
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
    )
