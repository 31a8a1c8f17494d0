"""Sentences for people: plan, data, metrics and what happens now."""

from __future__ import annotations

from finetune_api.names import Stage
from finetune_api.progress import Split
from finetune_api.results import PrepareReport, PublishReport, TrainMetrics
from finetune_api.scores import JudgeVerdict, TextMetrics
from finetune_api.snapshot import Snapshot
from finetune_api.spec import FineTuneJobSpec, Full
from finetune_api.status import DataStatus, GpuTimeStatus, MetricsStatus, PlanStatus

SUMMARIZED = (
    ("exact match", "exact_match"),
    ("ROUGE-L", "rouge_l"),
    ("BLEU", "bleu"),
    ("chrF", "chrf"),
    ("JSON", "json_validity"),
    ("regex", "regex"),
)
"""Scores that stand in the summary: what they are called there, and their fields."""
NO_GPU_USED = "No GPU was used."


def gpu_request(spec: FineTuneJobSpec, gpus_per_node: int | None) -> str:
    """``1 × nvidia.com/gpu (NVIDIA-A10G)``; empty without GPUs.

    Args:
        gpus_per_node: None as long as the plan that chooses them is not made.
    """
    if gpus_per_node == 0:
        return ""
    product = f" ({spec.compute.gpu.product})" if spec.compute.gpu.product else ""
    resource = f"{spec.compute.gpu.resource_name}{product}"
    count = f"as many {resource} as the plan needs" if gpus_per_node is None else f"{gpus_per_node} × {resource}"
    return count if spec.compute.nodes == 1 else f"{count} on each of {spec.compute.nodes} nodes"


def sentence(text: str) -> str:
    """Without surrounding blanks and with a full stop."""
    text = text.strip()
    return text if not text or text[-1] in ".!?…" else f"{text}."


def full_weights(full: Full) -> str:
    """What method Full trains."""
    if full.spectrum is not None:
        return f"weights (Spectrum, {full.spectrum.fraction:g} of each kind)"
    return f"weights of {', '.join(full.modules)}" if full.modules else "weights (all)"


def plan_status(snapshot: Snapshot, report: PrepareReport | None) -> PlanStatus:
    """The resolved method and sizes; counts only after prepare has found them."""
    plan = snapshot.plan
    memory = report.plan if report is not None else None
    gpus = snapshot.spec.compute.gpus(memory.gpus_per_node if memory else None)
    where = gpu_request(snapshot.spec, gpus) or "the CPU"
    if snapshot.spec.training.use_cpu and gpus:
        where = f"the CPU of a pod with {where}"
    method = snapshot.resolved(memory.method if memory else None).plan.method
    split = memory.split if memory else snapshot.split
    quantization = f" ({method.quantization.type})" if method.quantization else ""
    lora = method.lora if method.full is None else None
    trained = full_weights(method.full) if method.full else f"rank {method.lora.rank}, alpha {method.lora.alpha}"
    parts = [
        f"{method.type}{quantization} {trained} on {where}: "
        f"micro-batch {split.micro_batch_sequences} × accumulation {split.gradient_accumulation_steps}, "
        f"learning rate {plan.learning_rate:g}"
    ]
    if report is not None:
        parts[0] += f", {report.total_steps:,} steps"
        share = (
            f" ({100 * report.trainable_parameters / report.total_parameters:.2f} %)" if report.total_parameters else ""
        )
        parts.append(f"{report.trainable_parameters:,} trainable parameters{share}")
        parts.extend(sentence(w)[:-1] for w in report.warnings[:3])
    return PlanStatus(
        method=method.type,
        rank=lora.rank if lora else None,
        alpha=lora.alpha if lora else None,
        learning_rate=plan.learning_rate,
        micro_batch_sequences=split.micro_batch_sequences,
        gradient_accumulation_steps=split.gradient_accumulation_steps,
        gpus_per_node=gpus,
        needed_memory_bytes=memory.needed_bytes if memory else None,
        usable_memory_bytes=memory.usable_bytes if memory else None,
        unsuitable_gpu_products=memory.unsuitable_gpu_products if memory else None,
        memory=memory.summary if memory else None,
        total_steps=report.total_steps if report else None,
        trainable_parameters=report.trainable_parameters if report else None,
        total_parameters=report.total_parameters if report else None,
        summary=sentence("; ".join(parts)),
    )


_NOW = " Since then cut otherwise to fit the memory: "


def with_split(plan: PlanStatus, split: Split) -> PlanStatus:
    """The plan as an out-of-memory error has changed it; the result is the same, but for sequences that became shorter."""
    checkpointing = "with" if split.gradient_checkpointing else "without"
    words = (
        f"micro-batch {split.micro_batch_sequences} × accumulation {split.gradient_accumulation_steps}, {checkpointing} gradient "
        f"checkpointing, sequences of at most {split.max_sequence_tokens:,} tokens."
    )
    return plan.model_copy(
        update={
            "micro_batch_sequences": split.micro_batch_sequences,
            "gradient_accumulation_steps": split.gradient_accumulation_steps,
            "summary": f"{plan.summary.split(_NOW)[0]}{_NOW}{words}",
        }
    )


def data_status(report: PrepareReport, max_tokens: int) -> DataStatus:
    """What the data checks found."""
    data = report.data
    formats = ", ".join(sorted(data.formats)) or "no"
    parts = [
        f"{data.rows:,} rows, {formats} format",
        f"{data.train_rows:,} train / {data.held_out_rows:,} held out",
    ]
    if data.bad_rows:
        parts.append(f"{data.bad_rows:,} unusable rows left out")
    if data.duplicate_rows:
        parts.append(f"{data.duplicate_rows:,} exact duplicates")
    if data.near_duplicate_rows:
        parts.append(f"{data.near_duplicate_rows:,} near duplicates")
    if data.held_out_near_rows:
        parts.append(f"{data.held_out_near_rows:,} held-out rows nearly stand in training")
    parts.append(f"p95 {data.tokens.p95:,} tokens")
    if data.truncated_rows:
        parts.append(f"{data.truncated_rows:,} rows truncated at {max_tokens}")
    if data.dropped_rows:
        parts.append(f"{data.dropped_rows:,} rows longer than {max_tokens} tokens dropped")
    return DataStatus(
        rows=data.rows,
        train_rows=data.train_rows,
        held_out_rows=data.held_out_rows,
        bad_rows=data.bad_rows,
        truncated_rows=data.truncated_rows,
        duplicate_rows=data.duplicate_rows,
        hash=report.data_hash,
        summary=sentence("; ".join(parts)),
    )


def _early(metrics: TrainMetrics) -> list[str]:
    if metrics.early_stop_step is None:
        return []
    return [f"stopped early after step {metrics.early_stop_step:,}: the held-out loss no longer fell"]


def metrics_status(metrics: TrainMetrics, published: PublishReport | None = None) -> MetricsStatus:
    """Losses before and after; once published, what answers score."""
    text = published.text_metrics if published is not None else None
    judge = published.judge if published is not None else None
    tasks = published.tasks if published is not None else []
    accuracy = (metrics.token_accuracy_base, metrics.token_accuracy)
    told = [
        f"held-out loss {metrics.held_out_loss_base:.3f} → {metrics.held_out_loss:.3f} "
        f"(perplexity {metrics.perplexity_base:.2f} → {metrics.perplexity:.2f})",
        *([f"token accuracy {accuracy[0]:.1%} → {accuracy[1]:.1%}"] if None not in accuracy else []),
        *([text_summary(text)] if text is not None else []),
        *([judge_summary(judge)] if judge is not None else []),
        *(f"{task.task} {task.metric} {task.base:.3f} → {task.tuned:.3f}" for task in tasks),
        f"{metrics.tokens_per_second:,.0f} tokens/s",
        *_early(metrics),
    ]
    return MetricsStatus(
        held_out_loss_base=metrics.held_out_loss_base,
        held_out_loss=metrics.held_out_loss,
        perplexity_base=metrics.perplexity_base,
        perplexity=metrics.perplexity,
        token_accuracy_base=metrics.token_accuracy_base,
        token_accuracy=metrics.token_accuracy,
        final_train_loss=metrics.final_train_loss,
        tokens_per_second=metrics.tokens_per_second,
        text=text,
        judge=judge,
        tasks=tasks or None,
        summary="; ".join(told),
    )


def judge_summary(judge: JudgeVerdict) -> str:
    """How often the judge preferred the tuned model's answer, in a line."""
    if not judge.pairs:
        return f"no verdict of {judge.model}"
    invalid = f", {judge.invalid} invalid" if judge.invalid else ""
    return f"{judge.model} on {judge.pairs} pairs: {judge.wins} wins, {judge.ties} ties, {judge.losses} losses{invalid}"


def text_summary(text: TextMetrics) -> str:
    """The scores of the answers, base → tuned, in a line."""
    pairs = [(name, getattr(text.base, field), getattr(text.tuned, field)) for name, field in SUMMARIZED]
    told = [f"{name} {base:.2f} → {tuned:.2f}" for name, base, tuned in pairs if base is not None and tuned is not None]
    return f"{', '.join(told) or 'no scores'} on {text.answers} answers"


def gpu_time_status(held_seconds: int, training_seconds: int | None) -> GpuTimeStatus:
    """GPU-seconds, and the share of them that made optimizer steps that count."""
    held = f"GPUs held for {held_seconds:,} GPU-seconds"
    if training_seconds is None:
        return GpuTimeStatus(held_seconds=held_seconds, summary=f"{held}.")
    share = min(1.0, training_seconds / held_seconds)
    return GpuTimeStatus(
        held_seconds=held_seconds,
        training_seconds=training_seconds,
        utilization=round(share, 3),
        summary=f"{held}, {share:.0%} of them training.",
    )


def queued_message(spec: FineTuneJobSpec, gpus_per_node: int | None, stage: Stage, queue: str, admitted: bool) -> str:
    """What a Job that has no running pod yet waits for."""
    what = gpu_request(spec, gpus_per_node) if stage is Stage.TRAIN else ""
    if admitted:
        return f"Starting the training pod{f' with {what}' if what else ''}."
    return f"Queued in {queue or 'its queue'}: waits for {what or 'a place'}."
