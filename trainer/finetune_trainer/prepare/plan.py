"""What training will hold on a GPU, and the choices that follow, before a GPU is asked for."""

from __future__ import annotations

import logging

from finetune_api.failures import Reason
from finetune_api.planner import (
    Architecture,
    Choice,
    Gpu,
    Shapes,
    UnknownArchitecture,
    UnknownGpu,
    UnknownTarget,
    choose,
    find_gpu,
    misfit_sentence,
    parameter_shapes,
    parse_config,
    plan,
    plan_sentence,
    request_of,
)
from finetune_api.planner.plan import EVALUATION_TOKENS, Request
from finetune_api.planner.sentences import gib
from finetune_api.progress import Split
from finetune_api.quantity import parse_quantity
from finetune_api.results import DataSummary, RunPlan
from finetune_api.snapshot import largest_divisor, rank_count
from finetune_api.spec import FineTuneJobSpec, MethodType
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.model import BaseModel

log = logging.getLogger(__name__)


def plan_run(spec: FineTuneJobSpec, split: Split, model: BaseModel, data: DataSummary) -> RunPlan | None:
    """The plan of a run on GPUs, for the longest row that there is; None on a CPU, and for a model whose sizes are not known.

    Args:
        split: what is done without a plan: the user's micro-batch, or a default.

    Raises:
        StageError: DoesNotFit; InvalidConfig, for Auto with a GPU or a model that nothing is known of.
    """
    if spec.training.use_cpu:
        return None
    gpu = gpu_of(spec)
    try:
        arch = parse_config(model.config)
        shapes = parameter_shapes(model.shapes, arch)
        request = request_for(spec, arch, shapes, data)
        return from_request(spec, split, request, gpu, model.uri)
    except (UnknownArchitecture, UnknownTarget) as error:
        if spec.method.type is MethodType.AUTO:
            raise StageError(
                Reason.INVALID_CONFIG, f"method.type: Auto: the memory of this model cannot be planned ({error})."
            ) from error
        log.warning("the memory of this model cannot be planned: %s", error)
        return None


def gpu_of(spec: FineTuneJobSpec) -> Gpu | None:
    """The kind of GPU that is asked for: its declared memory, or that of its product.

    Raises:
        StageError: InvalidConfig, where Auto needs to know it.
    """
    asked = spec.compute.gpu
    try:
        known = find_gpu(asked.product) if asked.product else None
    except UnknownGpu as error:
        if asked.memory is None and spec.method.type is MethodType.AUTO:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"method.type: Auto: {asked.product} is not in the table of GPUs. Declare its memory in compute.gpu.memory.",
            ) from error
        known = None
    if asked.memory is None:
        return known
    usable = int(parse_quantity(asked.memory))
    if known is not None:
        return known.model_copy(update={"usable_bytes": usable})
    return Gpu(product=asked.product or f"GPU with {asked.memory}", usable_bytes=usable)


def request_for(spec: FineTuneJobSpec, arch: Architecture, shapes: Shapes, data: DataSummary) -> Request:
    """What to plan: rows are as long as the longest, which is often far below the limit."""
    length = spec.training.length
    epochs = length.epochs or 0.0
    if length.steps is not None:
        epochs = length.steps * spec.training.global_batch_sequences / max(1, data.train_rows)
    request = request_of(
        spec, arch, shapes, gpus=rank_count(spec), run_tokens=max(1, round(epochs * data.train_tokens))
    )
    longest = max(1, min(spec.training.max_sequence_tokens, data.tokens.max))
    return request.model_copy(update={"batch": request.batch.model_copy(update={"sequence_tokens": longest})})


def from_request(spec: FineTuneJobSpec, split: Split, request: Request, gpu: Gpu | None, uri: str) -> RunPlan:
    """Choose, where the GPU is known; otherwise only tell what will be needed.

    Raises:
        StageError: DoesNotFit.
    """
    if gpu is None:
        four_bit = request.tuning.model_copy(update={"four_bit": spec.method.type is MethodType.QLORA})
        batch = request.batch.model_copy(update={"micro_batch_sequences": split.micro_batch_sequences})
        planned = plan(request.model_copy(update={"tuning": four_bit, "batch": batch}))
        return RunPlan(
            method=spec.method.type,
            split=split,
            needed_bytes=planned.needed_bytes,
            peak_allocated_bytes=planned.peak_allocated_bytes,
            verified=planned.verified,
            summary=f"needs {gib(planned.needed_bytes)} of GPU memory by plan; whether the GPU has it is not known",
        )
    choice = choose(
        request,
        gpu.usable_bytes,
        spec.training.global_batch_sequences,
        None if spec.method.type is MethodType.AUTO else spec.method.type,
        spec.training.micro_batch_sequences,
        evaluation_follows=True,
        sharding=False,
    )
    if not choice.fit.fits and (
        choice.planned.verified or (request.architecture.known and not request.architecture.experts)
    ):
        # Sharding over more GPUs is not offered: training does not do it yet.
        here = choice.fit.model_copy(update={"alternatives": [a for a in choice.fit.alternatives if a.gpus is None]})
        raise StageError(Reason.DOES_NOT_FIT, misfit_sentence(uri, choice.request, here, gpu))
    return _chosen(spec, split, choice, gpu)


def _chosen(spec: FineTuneJobSpec, split: Split, choice: Choice, gpu: Gpu) -> RunPlan:
    planned = plan(choice.request, gpu.peak_tflops)
    share = -(-spec.training.global_batch_sequences // choice.request.gpus)
    micro = largest_divisor(share, choice.micro_batch_sequences)
    misfit = "" if choice.fit.fits else " By an estimate that was not verified for this family it does not fit."
    return RunPlan(
        method=choice.method,
        split=split.model_copy(
            update={
                "micro_batch_sequences": micro,
                "gradient_accumulation_steps": share // micro,
                "evaluation_divisor": max(1, EVALUATION_TOKENS // choice.request.evaluation_tokens),
            }
        ),
        gpu=gpu.name,
        needed_bytes=planned.needed_bytes,
        usable_bytes=gpu.usable_bytes,
        peak_allocated_bytes=planned.peak_allocated_bytes,
        estimated_seconds=planned.work.seconds,
        verified=planned.verified,
        summary=f"{plan_sentence(choice.request, planned, gpu)} {choice.reason}{misfit}",
    )
