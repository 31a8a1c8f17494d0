"""Every row of every source: fetched, checked, tokenised, and spooled to the local disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api.failures import Reason
from finetune_api.names import held_out_slot, train_slot
from finetune_api.spec import DataFormat, DataSource, FineTuneJobSpec
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import special_token_pattern
from finetune_trainer.prepare.detect import LOOKED_AT, check_columns, detect
from finetune_trainer.prepare.encode import Dropped, Encoded, Encoder, fit
from finetune_trainer.prepare.examples import (
    ALL_FIELDS,
    Completion,
    Conversation,
    Example,
    Tokenized,
    to_example,
)
from finetune_trainer.prepare.model import BaseModel
from finetune_trainer.prepare.problems import LOGGED, Problems, RowProblem
from finetune_trainer.prepare.rows import RawRow, read_rows
from finetune_trainer.prepare.split import copies, group_of
from finetune_trainer.prepare.store import SPOOL_SCHEMA, Index, RowWriter
from finetune_trainer.sources.data import DataFile, fetch_data
from finetune_trainer.text import plural
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)


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
    checked = Checked(ctx.work_dir / "spool.parquet", Index.empty(), Problems(spec.data.checks.max_bad_rows))
    sources = sources_of(ctx)
    columns = [check_columns(source.spec, source.field) for source in sources]
    with RowWriter(checked.spool, SPOOL_SCHEMA) as writer:
        checker = _RowChecker(spec, model, checked, writer)
        for source, mapping in zip(sources, columns, strict=True):
            files = _fetch(ctx, source)
            ctx.reporter.report(activity="Checking")
            before = checked.rows
            wanted = {mapping.get(name, name) for name in ALL_FIELDS}
            rows = itertools.chain.from_iterable(read_rows(file, wanted) for file in files)
            first = list(itertools.islice(rows, LOOKED_AT))
            fmt = detect(source.spec, source.field, mapping, first)
            for raw in itertools.chain(first, rows):
                if fmt is None and raw.value is not None:
                    fmt = detect(source.spec, source.field, mapping, [raw])
                checker.check(raw, source, fmt, mapping)
            found = checked.rows - before
            if not found:
                raise StageError(Reason.TOO_FEW_ROWS, f"{source.field} ({source.spec.uri}) holds no rows")
            log.info("%s: %s in %s, format %s", source.spec.uri, plural(found, "row"), plural(len(files), "file"), fmt)
    checked.problems.check(checked.rows)
    return checked


def _fetch(ctx: StageContext, source: Source) -> list[DataFile]:
    ctx.reporter.report(activity="Downloading")
    moved = ctx.reporter.transfer("download")
    folder = ctx.work_dir / "data" / source.slot
    return wait_until_available(ctx, lambda: fetch_data(ctx, source.spec, source.slot, folder, moved))


class _RowChecker:
    """Judges one row after the other."""

    def __init__(self, spec: FineTuneJobSpec, model: BaseModel, checked: Checked, writer: RowWriter) -> None:
        self._limit = spec.training.max_sequence_tokens
        self._seed = spec.training.seed
        self._overlength = spec.data.checks.overlength
        self._model = model
        self._encoder = Encoder(model.tokenizer, model.renderer, spec.objective.sft.loss_on)
        self._checked = checked
        self._writer = writer
        self._special = special_token_pattern(model.tokenizer)

    def check(self, raw: RawRow, source: Source, fmt: DataFormat | None, columns: Mapping[str, str]) -> None:
        """Spool the row, or count why not."""
        checked = self._checked
        row = checked.rows
        checked.rows += 1
        try:
            example = self._example(raw, fmt, columns)
            if checked.problems.too_many and checked.problems.count > LOGGED:
                return  # the job fails in any case: only the counting goes on
            whole = self._encoder.encode(example)
            encoded = fit(whole, self._limit, self._overlength)
            self._check_vocabulary(encoded)
        except RowProblem as problem:
            checked.problems.add(raw.source, problem.text)
        except Dropped as reason:
            checked.dropped += 1
            if checked.dropped <= LOGGED:
                log.warning("%s dropped: %s", raw.source, reason.text)
        else:
            self._keep(row, raw.source, example, whole, encoded, source)
            checked.formats[str(fmt)] += 1

    def _example(self, raw: RawRow, fmt: DataFormat | None, columns: Mapping[str, str]) -> Example:
        if raw.value is None or fmt is None:
            raise RowProblem(raw.problem or "not usable")
        example = to_example(raw.value, fmt, columns, self._model.renderer is not None)
        if isinstance(example, Conversation) and self._model.renderer is None:
            raise StageError(
                Reason.CHAT_TEMPLATE_MISSING,
                f"{raw.source}: the rows are conversations, and the tokenizer of {self._model.uri} has no chat template",
            )
        if isinstance(example, Tokenized) and (largest := max(example.ids)) >= self._model.vocabulary:
            raise RowProblem(
                f"{columns.get('input_ids', 'input_ids')}: token {largest}, and the model's embedding has {self._model.vocabulary:,} rows: "
                "another tokenizer made them"
            )
        return example

    def _keep(self, row: int, line: str, example: Example, whole: Encoded, encoded: Encoded, source: Source) -> None:
        content = int.from_bytes(hashlib.blake2b(whole.ids.tobytes(), digest_size=8).digest(), "little")
        self._checked.index.add(group_of(example.group), content, whole.length, source.held_out)
        self._checked.truncated += whole.length > len(encoded.ids)
        asked = example if isinstance(example, Conversation | Completion) else None
        if asked is not None:
            self._checked.with_special_tokens += bool(self._special.search(f"{asked.group} {asked.reference}"))
        self._writer.write(
            {
                "row": row,
                "source": line,
                "input_ids": encoded.ids,
                "labels": encoded.labels,
                "prompt_tokens": encoded.prompt_tokens,
                "prompt": asked.prompt if asked is not None else None,
                "reference": asked.reference if asked is not None else None,
                "context": json.dumps([example.messages[:-1], example.tools])
                if isinstance(example, Conversation)
                else None,
                "copies": copies(source.spec.weight, self._seed, row),
            },
            len(encoded.ids),
        )

    def _check_vocabulary(self, encoded: Encoded) -> None:
        largest = int(encoded.ids.max())
        if largest >= self._model.vocabulary:
            raise StageError(
                Reason.UNSUPPORTED_MODEL,
                f"the tokenizer yields token {largest}, and the model's embedding has {self._model.vocabulary:,} rows: they do not belong together",
            )
