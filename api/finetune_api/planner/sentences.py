"""Plans in words, for status, conditions and terminals."""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.planner.distributed import Layout
from finetune_api.planner.fit import Alternative, Fit
from finetune_api.planner.gpus import Gpu
from finetune_api.planner.plan import Decisive, MemoryPlan, Request

GIB = 1 << 30
ESTIMATED_MISFIT = "By an estimate that was not verified for this family it does not fit."
"""Said instead of a refusal."""


def gib(size: int) -> str:
    """``12.9 GiB``."""
    return f"{size / GIB:.1f} GiB"


def number(size: int) -> str:
    """``12.9``."""
    return f"{size / GIB:.1f}"


def duration(seconds: float) -> str:
    """``2.3 hours``, ``14 minutes``."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} minutes"


def gpu_names(gpus: Sequence[Gpu]) -> str:
    """``Tesla T4, NVIDIA A10G``."""
    return ", ".join(gpu.name for gpu in gpus)


def plan_sentence(request: Request, planned: MemoryPlan, gpu: Gpu) -> str:
    """What runs where, and what its memory is spent on."""
    overhead = (
        planned.context_bytes + planned.fragmentation_bytes + planned.communication_bytes + planned.gathered_bytes
    )
    training = planned.adapter_bytes + planned.gradient_bytes + planned.optimizer_bytes
    weights = planned.weight_bytes + planned.quantization_constant_bytes
    rest = planned.needed_bytes - weights - training - overhead
    shards = " (FSDP)" if request.layout is Layout.FSDP else ""
    if request.layout is Layout.CPU_OFFLOAD:
        shards = f" (CPU offload: {gib(planned.offloaded_bytes)} of the base in host memory for each)"
    trained = "trained weights" if request.tuning.full else "adapter"
    share = 100 * planned.trainable_parameters / planned.total_parameters
    estimate = (
        "" if planned.verified else " An estimate: this family or layout has not been compared with simulated runs."
    )
    work = planned.work
    time = f" About {duration(work.seconds)} by estimate." if work.seconds is not None and request.run_tokens else ""
    return (
        f"{request.tuning.name} on {request.gpus} × {gpu.name}{shards}: peak {gib(planned.needed_bytes)} of {number(gpu.usable_bytes)} usable "
        f"(weights {number(weights)}, activations and logits {number(rest)}, {trained} and optimizer {number(training)}, "
        f"overhead {number(overhead)}). {planned.trainable_parameters:,} trainable parameters ({share:.2f} %).{time}{estimate}"
    )


def misfit_sentence(model: str, request: Request, verdict: Fit, gpu: Gpu) -> str:
    """By how much it does not fit, and what would."""
    per = "on one GPU" if request.gpus == 1 else f"on each of {request.gpus} GPUs"
    options = " · ".join(alternative_phrase(a) for a in verdict.alternatives)
    advice = f"It fits with: {options}." if options else "Nothing this planner knows makes it fit."
    if verdict.decisive is Decisive.EVALUATION:
        per += f" (evaluation, in batches of {request.evaluation_tokens} tokens and {request.generation_prompts} prompts, needs the most)"
    return (
        f"{model}, {request.tuning.name}, {request.batch.sequence_tokens} tokens, micro-batch {request.batch.micro_batch_sequences} "
        f"needs {gib(verdict.needed_bytes)} {per}; {gpu.name} has {gib(verdict.limit_bytes)} to use with the 5 % margin, "
        f"{gib(verdict.missing_bytes)} too little. {advice}"
    )


def alternative_phrase(alternative: Alternative) -> str:
    """A change in the words of the spec."""
    parts = []
    if alternative.method:
        parts.append(f"method.type: {alternative.method}")
    if alternative.quantization:
        parts.append(f"method.quantization.type: {alternative.quantization}")
    if alternative.spectrum_fraction:
        parts.append(f"method.full.spectrum.fraction: {alternative.spectrum_fraction:g}")
    if alternative.gradient_checkpointing:
        parts.append("training.gradientCheckpointing: true")
    if alternative.sequence_tokens:
        parts.append(f"training.maxSequenceTokens: {alternative.sequence_tokens}")
    if alternative.micro_batch_sequences:
        parts.append(f"training.microBatchSequences: {alternative.micro_batch_sequences}")
    if alternative.gpus:
        parts.append(f"compute.gpusPerNode: {alternative.gpus} (FSDP)")
    if alternative.cpu_offload:
        parts.append("training.cpuOffload: IfNeeded")
    if alternative.gpu_products:
        parts.append("one of " + ", ".join(alternative.gpu_products))
    return f"{' and '.join(parts)} ({gib(alternative.needed_bytes)})"
