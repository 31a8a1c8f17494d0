"""``finetune plan``: whether a job fits a GPU, before there is one."""

from __future__ import annotations

import sys
from enum import IntEnum, StrEnum
from pathlib import Path
from typing import Annotated

import typer
from pydantic import ValidationError
from rich.console import Console

from finetune_api.planner import (
    Attention,
    Choice,
    Gpu,
    UnknownGpu,
    UnknownTarget,
    Unsuitable,
    by_compute_dtype,
    choose,
    find_gpu,
    gpu_counts,
    host_memory_misfit,
    is_shardable,
    left_in_16_bit,
    misfit_sentence,
    plan,
    plan_sentence,
    possible,
    refuses,
    request_of,
    rounds,
    why_not_tunable,
)
from finetune_api.planner.sentences import ESTIMATED_MISFIT
from finetune_api.spec import FineTuneJobSpec, MethodType
from finetune_cli.job_file import BadInput, read_job
from finetune_cli.model_files import ModelFiles, from_config, from_folder
from finetune_cli.plan_table import plan_table
from finetune_cli.quantity import parse_bytes


class Exit(IntEnum):
    """Exit codes."""

    FITS = 0
    BAD_INPUT = 2
    DOES_NOT_FIT = 3


class Method(StrEnum):
    """What ``--method`` takes."""

    AUTO = "Auto"
    LORA = "LoRA"
    QLORA = "QLoRA"
    FULL = "Full"


def plan_command(
    file: Annotated[Path, typer.Argument(help="YAML file with one FineTuneJob.")],
    config: Annotated[Path | None, typer.Option(help="The base model's config.json.")] = None,
    model_folder: Annotated[Path | None, typer.Option(help="The base model's folder; only headers are read.")] = None,
    gpu: Annotated[
        str | None, typer.Option(help='Product, as in "NVIDIA A10G" or its node label, instead of the file\'s.')
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Usable memory of a GPU, such as 24Gi.")] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="How many GPUs of each node, instead of the file's.")] = None,
    method: Annotated[Method | None, typer.Option(help="Instead of the file's; Auto takes LoRA if it fits.")] = None,
    attention: Annotated[Attention, typer.Option(help="How the model computes attention.")] = Attention.SDPA,
    train_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of the whole run, for its time.")] = None,
    tflops: Annotated[float | None, typer.Option(min=0.1, help="TFLOP/s a GPU sustains, if measured.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Print what a FineTuneJob would hold on a GPU, and whether its prepare stage would refuse it.

    Exit code 0: it fits, or an estimate says that it does not, which refuses nothing; 3: it does not fit; 2: bad input, or what this model or
    GPU cannot do.
    """
    try:
        name, spec = read_job(file)
        if method and method.value != spec.method.type.value:
            spec = with_method(spec, MethodType(method.value))
        model = read_model(config, model_folder)
        asked = spec.compute.gpu
        device = read_gpu(gpu, gpu_memory) if gpu or gpu_memory else read_gpu(asked.product, asked.memory)
        shardable = check(spec, model, device)
        tries = rounds(spec, shardable)
        for count, several in [(n, may) for may in tries for n in ([gpus] if gpus else gpu_counts(spec, may))]:
            choice = choose(
                request_of(
                    spec,
                    model.architecture,
                    model.shapes,
                    gpus=count * spec.compute.nodes,
                    attention=attention,
                    run_tokens=train_tokens,
                ),
                device.usable_bytes,
                spec.training.global_batch_sequences,
                None if spec.method.type is MethodType.AUTO else spec.method.type,
                spec.training.micro_batch_sequences,
                evaluation_follows=True,
                several=several,
            )
            if choice.fit.fits:
                break
    except (BadInput, UnknownGpu, UnknownTarget, Unsuitable) as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(Exit.BAD_INPUT) from error
    planned = plan(choice.request, device.peak_tflops, tflops)
    offered = possible(spec, choice.fit.alternatives, shardable)
    verdict = choice.fit.model_copy(update={"alternatives": offered})
    settled = choice.model_copy(update={"planned": planned, "fit": verdict})
    host = host_memory_misfit(spec, choice) if choice.fit.fits else ""
    if as_json:
        sys.stdout.write(as_json_text(settled) + "\n")
    else:
        show(name, settled, device, host)
    raise typer.Exit(Exit.DOES_NOT_FIT if refuses(settled) or host else Exit.FITS)


def with_method(spec: FineTuneJobSpec, kind: MethodType) -> FineTuneJobSpec:
    """The same job by another method, as far as its settings apply to that.

    Raises:
        BadInput: it has settings that do not.
    """
    told = spec.to_json_dict()
    method = {**spec.method.to_json_dict(), "type": kind.value}
    if spec.method.type is MethodType.FULL:
        method.pop("full", None)
    try:
        return FineTuneJobSpec.model_validate({**told, "method": method})
    except ValidationError as error:
        raise BadInput(f"--method {kind.value}: {error.errors()[0]['msg']}") from error


def check(spec: FineTuneJobSpec, model: ModelFiles, device: Gpu) -> bool:
    """Whether the model can be loaded a layer at a time. What QLoRA leaves in 16 bit is told.

    Raises:
        Unsuitable: the job asks for what model or GPU cannot do, which the prepare stage refuses too.
    """
    if refused := why_not_tunable(model.config, spec.model.uri):
        raise Unsuitable(refused)
    by_compute_dtype(spec, [device])
    shardable = is_shardable(spec, model.architecture, model.stored)
    if much := left_in_16_bit(spec.method.type, model.architecture, model.shapes, spec.model.uri):
        sys.stderr.write(f"warning: {much}\n")
    return shardable


def read_model(config: Path | None, folder: Path | None) -> ModelFiles:
    """From exactly one of both.

    Raises:
        BadInput: none, or both.
    """
    if config is not None and folder is None:
        return from_config(config)
    if folder is not None and config is None:
        return from_folder(folder)
    raise BadInput("expected one of --config and --model-folder")


def read_gpu(product: str | None, memory: str | None) -> Gpu:
    """A known product, or one declared by its memory (or both: the declared memory counts).

    Raises:
        BadInput: neither, or an unreadable quantity.
        UnknownGpu: a product that is not in the table, without memory.
    """
    if memory is None:
        if product is None:
            raise BadInput("expected --gpu or --gpu-memory, or compute.gpu in the file")
        return find_gpu(product)
    size = parse_bytes(memory)
    if product is None:
        return Gpu(product=f"GPU with {memory}", usable_bytes=size)
    try:
        return find_gpu(product).model_copy(update={"usable_bytes": size})
    except UnknownGpu:
        return Gpu(product=product, usable_bytes=size)


def as_json_text(choice: Choice) -> str:
    """The plan without the model's shapes."""
    return choice.model_dump_json(
        by_alias=True, exclude_none=True, indent=1, exclude={"request": {"shapes": True, "architecture": True}}
    )


def show(name: str, choice: Choice, gpu: Gpu, host_misfit: str) -> None:
    """Table and sentences."""
    console = Console(soft_wrap=True, highlight=False)
    console.print(plan_table(name, choice, gpu))
    console.print(plan_sentence(choice.request, choice.planned, gpu))
    console.print(choice.reason)
    if not choice.fit.fits:
        console.print(misfit_sentence(name, choice.request, choice.fit, gpu))
        if not refuses(choice):
            console.print(f"{ESTIMATED_MISFIT} An estimate refuses nothing.")
    if host_misfit:
        console.print(host_misfit)
