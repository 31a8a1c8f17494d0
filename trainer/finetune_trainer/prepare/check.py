"""Every row of every source: fetched, checked, tokenised, and spooled to the local disk."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from finetune_api.failures import Reason
from finetune_api.names import held_out_slot, train_slot
from finetune_api.spec import DataFormat, DataSource, FineTuneJobSpec, PiiPolicy
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.assess import Assessed, Batch, LeftOut, Recipe, Refused
from finetune_trainer.prepare.detect import check_columns, detect, with_format
from finetune_trainer.prepare.model import BaseModel
from finetune_trainer.prepare.problems import LOGGED, Problems, discreet
from finetune_trainer.prepare.rows import RawRow
from finetune_trainer.prepare.store import SPOOL_SCHEMA, Index, RowWriter
from finetune_trainer.prepare.workers import BATCH_ROWS, Assessors
from finetune_trainer.private import without_credentials
from finetune_trainer.sources.data import DataFile, fetch_data
from finetune_trainer.text import plural
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)

BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True)
class Source:
    """A source of the spec: its Secret's slot, its name in messages, and its side where it has one of its own."""

    spec: DataSource
    slot: str
    field: str
    held_out: bool


@dataclass
class Checked:
    """What came out of the checks. ``spool`` holds the usable rows, ``index`` what the split needs to know of them."""

    spool: Path
    index: Index
    problems: Problems
    rows: int = 0
    dropped: int = 0
    truncated: int = 0
    without_end: int = 0
    """Rows that teach no end: their last learned token ends no answer. Only rows of token ids can be so."""
    not_alternating: int = 0
    """Conversations in which user and assistant do not take turns."""
    found: Counter[str] = field(default_factory=Counter)
    """Personal data, by kind."""
    with_special_tokens: int = 0
    """Conversations and completions whose own text holds the text of a special token."""
    formats: Counter[str] = field(default_factory=Counter)


def sources_of(ctx: StageContext) -> list[Source]:
    """All sources, in the order in which their rows are numbered."""
    data = ctx.snapshot.spec.data
    train = [Source(s, train_slot(i), f"data.train[{i}]", False) for i, s in enumerate(data.train)]
    held = [
        Source(s, held_out_slot(i), f"data.heldOut.sources[{i}]", True)
        for i, s in enumerate(data.held_out.sources or [])
    ]
    return train + held


def check_data(ctx: StageContext, model: BaseModel) -> Checked:
    """Read, check and tokenise all rows.

    Raises:
        StageError: InvalidData, DatasetNotFound, ChatTemplateMissing, UnsupportedModel, InvalidConfig, AccessDenied, BucketNotFound.
    """
    spec = ctx.snapshot.spec
    redact = spec.data.checks.pii is PiiPolicy.REDACT
    checked = Checked(ctx.work_dir / "spool.parquet", Index(), Problems(spec.data.checks.max_bad_rows, redact))
    sources = sources_of(ctx)
    columns = [check_columns(source.spec, source.field) for source in sources]
    with (
        discreet(redact),
        RowWriter(checked.spool, SPOOL_SCHEMA) as writer,
        Assessors(Recipe.of(spec, model), model) as assessors,
    ):
        for source, mapping in zip(sources, columns, strict=True):
            files = _fetch(ctx, source)
            ctx.reporter.report(activity="Checking")
            before = checked.rows
            for batch, assessed in assessors.assessed(_batches(checked, spec, source, mapping, files)):
                _take(checked, writer, source, batch, assessed)
            found, shown = checked.rows - before, without_credentials(source.spec.uri)
            if not found:
                raise StageError(Reason.TOO_FEW_ROWS, f"{source.field} ({shown}) holds no rows")
            read = plural(found, "row"), plural(len(files), "file")
            log.info("%s: %s in %s, format %s", shown, *read, batch.format)
    checked.problems.check(checked.rows)
    return checked


def _batches(
    checked: Checked, spec: FineTuneJobSpec, source: Source, mapping: Mapping[str, str], files: list[DataFile]
) -> Iterator[Batch]:
    """A source's rows, some at a time, with the format that the first of them have."""
    batch: list[RawRow] = []
    characters, first, of_batch = 0, checked.rows, None
    rows = with_format(source.spec, source.field, files, mapping, lambda few: _format(spec, source, mapping, few))
    for raw, fmt in rows:
        if batch and (fmt is not of_batch or len(batch) >= BATCH_ROWS or characters >= BATCH_CHARACTERS):
            yield Batch(batch, first, of_batch, mapping, source.spec.weight)
            batch, characters, first = [], 0, first + len(batch)
        of_batch = fmt
        batch.append(raw)
        characters += _characters(raw.value)
    if batch:
        yield Batch(batch, first, of_batch, mapping, source.spec.weight)


def _format(
    spec: FineTuneJobSpec, source: Source, mapping: Mapping[str, str], first: Sequence[RawRow]
) -> DataFormat | None:
    fmt = detect(source.spec, source.field, mapping, first)
    if fmt is DataFormat.TOKENIZED and spec.data.checks.pii is PiiPolicy.REDACT:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{source.field} holds token ids, in which personal data cannot be found. Give texts, or set data.checks.pii to Ignore.",
        )
    return fmt


def _fetch(ctx: StageContext, source: Source) -> list[DataFile]:
    ctx.reporter.report(activity="Downloading")
    moved = ctx.reporter.transfer("download")
    folder = ctx.work_dir / "data" / source.slot
    return wait_until_available(ctx, lambda: fetch_data(ctx, source.spec, source.slot, folder, moved))


def _take(checked: Checked, writer: RowWriter, source: Source, batch: Batch, assessed: Assessed) -> None:
    """Counts and spools a batch that was assessed."""
    for place, outcome in assessed.others:
        line = batch.rows[place].source
        match outcome:
            case Refused(problem):
                checked.problems.add(line, problem)
            case LeftOut(why):
                checked.dropped += 1
                if checked.dropped <= LOGGED:
                    log.warning("%s dropped: %s", line, why)
    kept = assessed.kept
    checked.rows += len(batch.rows)
    checked.index.add(kept.remembered, source.held_out)
    checked.truncated += kept.truncated
    checked.without_end += kept.without_end
    checked.with_special_tokens += kept.with_special_tokens
    checked.not_alternating += kept.not_alternating
    checked.found.update(kept.found)
    if kept.rows.num_rows:
        checked.formats[str(batch.format)] += kept.rows.num_rows
        writer.write(pa.Table.from_batches([kept.rows]))


def _characters(value: object) -> int:
    """About how much memory a value takes."""
    match value:
        case str():
            return len(value)
        case dict():
            return sum(map(_characters, value.values()))
        case [int(), *_]:
            return 8 * len(value)
        case list():
            return sum(map(_characters, value))
    return 8
