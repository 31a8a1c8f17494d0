"""``finetune inspect``: what the model will read of a job's data, token by token, and what it will learn of it.

The prepare stage's own code runs here, on this machine, and stores nothing. It needs the libraries of that stage; every other command does
without.
"""

from __future__ import annotations

import json
import sys
import tempfile
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from finetune_api.results import DataSummary, PreviewRow
from finetune_api.spec import FineTuneJobSpec
from finetune_cli.job_file import BadInput, read_job

if TYPE_CHECKING:
    from finetune_trainer.prepare.run import Examined

LEARNED, READ = "black on green", "dim"


class Exit(IntEnum):
    """Exit codes."""

    USABLE = 0
    BAD_INPUT = 2
    UNUSABLE = 3


def inspect_command(
    file: Annotated[Path, typer.Argument(help="YAML file with one FineTuneJob.")],
    rows: Annotated[int, typer.Option(min=0, max=100, help="How many of the first training rows are shown.")] = 3,
    volumes: Annotated[
        Path | None, typer.Option(help="Folder that stands for the claims of pvc:// sources: VOLUMES/<claim>/<path>.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print counts, warnings and rows as JSON.")] = False,
) -> None:
    """Check a FineTuneJob's model and data as its prepare stage will, and print the first rows' tokens: those that are learned stand out.

    Credentials are this shell's (AWS_…, HF_TOKEN); Secrets are not read. Exit code 0: usable; 3: the job would fail, with the reason; 2: bad
    input.
    """
    try:
        name, spec = read_job(file)
        found = examine_here(name, spec, rows, volumes)
    except BadInput as error:
        sys.stderr.write(f"{error}\n")
        raise typer.Exit(Exit.BAD_INPUT) from error
    if isinstance(found, str):
        sys.stderr.write(f"{found}\n")
        raise typer.Exit(Exit.UNUSABLE)
    if as_json:
        sys.stdout.write(json.dumps(as_data(found), ensure_ascii=False, indent=1) + "\n")
    else:
        show(name, found)


def examine_here(name: str, spec: FineTuneJobSpec, rows: int, volumes: Path | None) -> Examined | str:
    """What prepare finds, or why the job would fail.

    Raises:
        BadInput: prepare's libraries are not installed.
    """
    try:
        from finetune_trainer.errors import StageError
        from finetune_trainer.prepare.run import examine
        from finetune_trainer.workbench import context_here
    except ImportError as error:
        raise BadInput(
            f"finetune inspect needs the libraries of the prepare stage: pip install 'finetune-operator[cli,prepare]' ({error})"
        ) from error
    with tempfile.TemporaryDirectory() as folder:
        try:
            known = spec.compute.gpu.product is not None or spec.compute.gpu.memory is not None
            ctx = context_here(name, without_secrets(spec), Path(folder), volumes)
            return examine(ctx, preview_rows=rows, with_plan=known)
        except StageError as error:
            return f"{error.reason}: {error.message}"


def without_secrets(spec: FineTuneJobSpec) -> FineTuneJobSpec:
    """The same spec, with the credentials of whoever runs this."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: strip(v) for k, v in value.items() if k != "secretRef"}
        return [strip(v) for v in value] if isinstance(value, list) else value

    # Trackers are not told of anything here, and some must have a Secret.
    return FineTuneJobSpec.model_validate(strip(spec.model_copy(update={"trackers": None}).to_json_dict()))


def as_data(found: Examined) -> dict[str, Any]:
    """For programs."""
    return {
        "data": found.prepared.data.to_json_dict(),
        "dataHash": found.prepared.data_hash,
        "trainableParameters": found.model.parameters.trainable,
        "trainedTokens": [token.to_json_dict() for token in found.tokens.tokens] if found.tokens is not None else [],
        "totalSteps": found.total_steps,
        "plan": found.plan.summary if found.plan is not None else None,
        "warnings": found.warnings,
        "rows": [row.to_json_dict() for row in found.prepared.preview],
    }


def show(name: str, found: Examined) -> None:
    """For people."""
    console = Console(highlight=False, soft_wrap=True)
    for row in found.prepared.preview:
        console.rule(Text(f"{row.source}, {row.length:,} tokens"), align="left")
        console.print(tokens_of(row))
    if found.prepared.preview:
        console.rule()
        console.print(Text.assemble(("learned", LEARNED), "  ", ("read only", READ)))
    console.print(f"{name}: {counts(found.prepared.data)}; {found.total_steps:,} steps")
    if found.tokens is not None:
        told = ", ".join(f"{t.token} {t.occurrences:,}" for t in found.tokens.tokens)
        console.print(f"trained tokens, and how often each stands in the training rows: {told}", markup=False)
    if found.plan is not None:
        console.print(found.plan.summary)
    else:
        console.print(
            "The memory is not planned: the job names no GPU, or trains on a CPU (finetune plan takes --gpu)."
        )
    for warning in found.warnings:
        console.print(f"warning: {warning}", markup=False)


def tokens_of(row: PreviewRow) -> Text:
    """A row's text, in which every token has the colour of what becomes of it; what is left out is counted."""
    shown = Text()
    for token, learned in zip(row.tokens, row.learned, strict=True):
        shown.append(token, LEARNED if learned else READ)
    if left := row.length - len(row.tokens):
        shown.append(f" … {left:,} tokens more", "italic")
    return shown


def counts(data: DataSummary) -> str:
    """The data in a line."""
    return (
        f"{data.train_rows:,} training rows ({data.train_tokens:,} tokens, {data.train_target_tokens:,} of them learned), "
        f"{data.held_out_rows:,} held out, {data.bad_rows:,} unusable"
    )
