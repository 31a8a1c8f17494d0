"""A FineTuneJob's spec in the planner's words."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from finetune_api.planner.architecture import Architecture
from finetune_api.planner.choose import SEVERAL, Choice
from finetune_api.planner.distributed import Layout
from finetune_api.planner.fit import Alternative
from finetune_api.planner.gpus import Gpu
from finetune_api.planner.plan import Request
from finetune_api.planner.sentences import gib, gpu_names
from finetune_api.planner.tensors import Shapes, describe
from finetune_api.planner.workload import Attention, Batch, Tuning
from finetune_api.quantity import parse_quantity
from finetune_api.snapshot import resolve_plan
from finetune_api.spec import (
    BEGIN_AT_WEIGHTS,
    MOST_GPUS_PER_NODE,
    WHOLE_WEIGHTS,
    ComputeDtype,
    CpuOffload,
    FineTuneJobSpec,
    MethodType,
    Parallelism,
    QuantizationType,
)
from finetune_api.spec.training import NO_BFLOAT16


class Unsuitable(ValueError):
    """The spec asks for what this model or these GPUs cannot do, however much memory there is."""


def request_of(
    spec: FineTuneJobSpec,
    arch: Architecture,
    shapes: Shapes,
    *,
    gpus: int = 1,
    attention: Attention = Attention.SDPA,
    run_tokens: int | None = None,
    token_rows: int | None = None,
) -> Request:
    """What :func:`finetune_api.planner.choose` takes; it settles the method and the micro-batch.

    Args:
        run_tokens: tokens of the whole run, as prepare counts them; without it a run of so many steps is taken to be of the longest
            rows, and one of epochs has no time.
        token_rows: tokens whose rows are trained, as prepare counts them; without it those that the spec names.
    """
    training, lora, resolved = spec.training, spec.method.lora, resolve_plan(spec)
    if run_tokens is None and training.length.steps is not None:
        run_tokens = training.length.steps * training.global_batch_sequences * training.max_sequence_tokens
    return Request(
        architecture=arch,
        shapes=shapes,
        tuning=Tuning(
            rank=lora.rank,
            dropout=lora.dropout,
            bias=lora.bias,
            target_modules=list(lora.target_modules),
            target_parameters=list(lora.target_parameters or []),
            exclude_modules=list(lora.exclude_modules or []),
            layers_to_transform=lora.layers_to_transform,
            rank_pattern=dict(lora.rank_pattern or {}),
            modules_to_save=list(lora.modules_to_save or []),
            token_rows=len(trained_tokens(spec)) if token_rows is None else token_rows,
            dora=lora.use_dora,
            offset=lora.initialization in BEGIN_AT_WEIGHTS,
            quantization=spec.method.quantization.type,
            double_quantization=spec.method.quantization.doubled,
            full=resolved.method.full,
            galore_rank=resolved.galore.rank if resolved.galore is not None else None,
        ),
        batch=Batch(
            sequence_tokens=training.max_sequence_tokens,
            gradient_checkpointing=training.gradient_checkpointing,
            attention=attention,
            packed=training.packing,
        ),
        optimizer=training.optimizer.name,
        gpus=gpus,
        generation_prompts=spec.evaluation.generation.prompts,
        generation_new_tokens=spec.evaluation.generation.max_new_tokens,
        run_tokens=run_tokens or 0,
    )


def rounds(spec: FineTuneJobSpec, shardable: bool = True) -> list[tuple[Layout, ...]]:
    """What several GPUs may do, the best first; in a second round, where nothing of the first fits by any method and number of GPUs, with
    the base in host memory.

    Args:
        shardable: whether the model can be loaded and sharded a layer at a time.
    """
    shardable = shardable and not is_whole(spec, spec.method.type, spec.method.quantization.type)
    first: tuple[Layout, ...]
    if spec.training.parallelism is Parallelism.AUTO:
        first = SEVERAL if shardable else (Layout.DDP,)
    else:
        first = (Layout(spec.training.parallelism.value),)
    offload: list[tuple[Layout, ...]] = [(Layout.CPU_OFFLOAD,)] if shardable else []
    match spec.training.cpu_offload:
        case CpuOffload.NEVER:
            return [first]
        case CpuOffload.IF_NEEDED:
            return [first, *offload]
        case CpuOffload.ALWAYS:
            return offload or [first]


def trained_tokens(spec: FineTuneJobSpec) -> set[str]:
    """The texts of the tokens whose rows are trained."""
    return {*(spec.model.new_tokens or []), *(spec.method.lora.trainable_tokens or [])}


def gpu_counts(spec: FineTuneJobSpec, several: Sequence[Layout]) -> Sequence[int]:
    """How many GPUs of each node the run may get, in the order in which they are tried: for Auto the fewest first, as GPUs that are not needed are
    wasted. More do not help where each holds a whole copy."""
    asked = spec.compute.gpus()
    if asked is not None:
        return [max(1, asked)]
    if Layout.FSDP not in several:
        return [1]
    alone = Layout.DDP in several or spec.compute.nodes > 1
    return range(1 if alone else 2, MOST_GPUS_PER_NODE + 1)


def is_whole(spec: FineTuneJobSpec, method: MethodType, quantization: QuantizationType) -> bool:
    """Whether a job by this method has the whole base on each GPU."""
    lora = spec.method.lora
    if method is MethodType.FULL or (method is not MethodType.LORA and quantization is QuantizationType.INT8):
        return True
    whole = lora.modules_to_save or lora.target_parameters or trained_tokens(spec)
    return lora.use_dora or bool(whole) or lora.initialization in WHOLE_WEIGHTS


def loaded_by_layers(spec: FineTuneJobSpec) -> str:
    """The setting that asks for it; empty if none does."""
    if spec.training.cpu_offload is CpuOffload.ALWAYS:
        return "training.cpuOffload: Always"
    return "training.parallelism: FSDP" if spec.training.parallelism is Parallelism.FSDP else ""


def is_shardable(spec: FineTuneJobSpec, arch: Architecture, stored: Collection[str]) -> bool:
    """Whether the model can be loaded, and so sharded or kept in host memory, a layer at a time.

    Args:
        stored: names of the tensors in the model's files: sharded, they are read one by one under the names that transformers has.

    Raises:
        Unsuitable: the spec asks for that with another model.
    """
    asked = loaded_by_layers(spec)
    shardable = arch.known and not arch.experts and set(describe(arch)) <= set(stored)
    if asked and not shardable:
        raise Unsuitable(
            f"{asked}: this model is none that can be loaded layer by layer. Leave it out, and several GPUs hold whole copies (DDP)."
        )
    return shardable


def by_compute_dtype(spec: FineTuneJobSpec, gpus: Sequence[Gpu]) -> tuple[list[Gpu], list[Gpu]]:
    """The GPUs that have the type which ``training.computeDtype`` asks for, and those that lack it.

    Raises:
        Unsuitable: all lack it.
    """
    lacking = [gpu for gpu in gpus if spec.training.compute_dtype is ComputeDtype.BFLOAT16 and not gpu.bfloat16]
    able = [gpu for gpu in gpus if gpu not in lacking]
    if lacking and not able:
        raise Unsuitable(NO_BFLOAT16.format(gpu_names(lacking)))
    return able, lacking


def refuses(choice: Choice) -> bool:
    """Whether a plan that does not fit refuses the run: an estimate, for a family that was not compared with simulated runs, refuses nothing."""
    return not choice.fit.fits and choice.request.architecture.compared


def possible(spec: FineTuneJobSpec, offered: Sequence[Alternative], shardable: bool = True) -> list[Alternative]:
    """Those alternatives that this job may take: sharding and offloading are for models that are loaded a layer at a time, by a method that
    does not need them whole."""
    counted = spec.compute.gpus() is not None and spec.compute.nodes == 1
    shardable = shardable and spec.training.parallelism is not Parallelism.DDP

    def may_share(change: Alternative) -> bool:
        method = MethodType(change.method) if change.method else spec.method.type
        quantization = QuantizationType(change.quantization) if change.quantization else spec.method.quantization.type
        return shardable and not is_whole(spec, method, quantization)

    return [
        change
        for change in offered
        if (change.gpus is None or (counted and may_share(change)))
        and (change.cpu_offload is None or may_share(change))
    ]


def host_memory_misfit(spec: FineTuneJobSpec, choice: Choice) -> str:
    """By how much ``compute.memory`` is too little for a base in host memory, or for checkpoints of full weights, in a sentence; empty where it is
    not, or not given."""
    planned, full = choice.planned, choice.request.tuning.full is not None
    if spec.compute.memory is None or not (planned.offloaded_bytes or full):
        return ""
    has = int(parse_quantity(spec.compute.memory))
    processes = choice.request.gpus // spec.compute.nodes
    needs = planned.host_memory_bytes * processes - planned.copied_bytes * (processes - 1)
    if needs <= has:
        return ""
    return (
        f"{'method.type: Full' if full else 'training.cpuOffload'} needs {gib(needs)} of host memory in each training pod by plan; compute.memory: {spec.compute.memory} is "
        f"{gib(needs - has)} too little."
    )
