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
    Architecture,
    Attention,
    Choice,
    Gpu,
    Shapes,
    UnknownGpu,
    UnknownTarget,
    choose,
    find_gpu,
    gpu_counts,
    host_memory_misfit,
    misfit_sentence,
    plan,
    plan_sentence,
    possible,
    request_of,
    rounds,
)
from finetune_api.spec import FineTuneJobSpec, MethodType
from finetune_cli.job_file import BadInput, read_job
from finetune_cli.model_files import from_config, from_folder
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
    """Print what a FineTuneJob would hold on a GPU. Exit code 0: it fits; 3: it does not; 2: bad input."""
    try:
        name, spec = read_job(file)
        if method and method.value != spec.method.type.value:
            spec = with_method(spec, MethodType(method.value))
        arch, shapes = read_model(config, model_folder)
        asked = spec.compute.gpu
        device = read_gpu(gpu, gpu_memory) if gpu or gpu_memory else read_gpu(asked.product, asked.memory)
        shardable = arch.known and not arch.experts
        tries = rounds(spec, shardable)
        for count, several in [(n, may) for may in tries for n in ([gpus] if gpus else gpu_counts(spec, may))]:
            choice = choose(
                request_of(
                    spec, arch, shapes, gpus=count * spec.compute.nodes, attention=attention, run_tokens=train_tokens
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
    except (BadInput, UnknownGpu, UnknownTarget) as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(Exit.BAD_INPUT) from error
    planned = plan(choice.request, device.peak_tflops, tflops)
    offered = possible(spec, choice.fit.alternatives, shardable)
    verdict = choice.fit.model_copy(update={"alternatives": offered})
    settled = choice.model_copy(update={"planned": planned, "fit": verdict})
    host = host_memory_misfit(spec, choice)
    if as_json:
        sys.stdout.write(as_json_text(settled) + "\n")
    else:
        show(name, settled, device, host)
    raise typer.Exit(Exit.FITS if settled.fit.fits and not host else Exit.DOES_NOT_FIT)


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


def read_model(config: Path | None, folder: Path | None) -> tuple[Architecture, Shapes]:
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
    if host_misfit:
        console.print(host_misfit)
