"""What becomes of a row: usable as tokens, unusable and why, or too long and left out. Nothing here counts or writes, so that several
processes may assess at a time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from finetune_api.failures import Reason
from finetune_api.results import IGNORED
from finetune_api.spec import DataFormat, FineTuneJobSpec, PiiPolicy
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import (
    ChatRenderer,
    add_new_tokens,
    end_of_turn_ids,
    load_tokenizer,
    special_token_pattern,
)
from finetune_trainer.prepare.encode import Dropped, Encoded, Encoder, fit
from finetune_trainer.prepare.examples import Completion, Conversation, Example, Text, Tokenized, to_example
from finetune_trainer.prepare.near import Tokens, shingles, sketch
from finetune_trainer.prepare.pii import redacted_example
from finetune_trainer.prepare.problems import RowProblem
from finetune_trainer.prepare.rows import RawRow
from finetune_trainer.prepare.split import copies, fingerprint, group_of
from finetune_trainer.prepare.store import SPOOL_SCHEMA, Remembered, flat, lists
from finetune_trainer.prepare.turns import alternates

if TYPE_CHECKING:
    # What its module imports would take the start of the worker processes half a CPU second.
    from finetune_trainer.prepare.model import BaseModel


@dataclass(frozen=True)
class Recipe:
    """All that an assessor is made of, as far as it can be sent to another process: a tokenizer with code of its own cannot."""

    spec: FineTuneJobSpec
    uri: str
    folder: Path
    vocabulary: int
    template: str | None

    @classmethod
    def of(cls, spec: FineTuneJobSpec, model: BaseModel) -> Recipe:
        """That for a job and its base model."""
        template = model.renderer.template if model.renderer is not None else None
        return cls(spec, model.uri, model.folder, model.vocabulary, template)

    def assessor(self, model: BaseModel | None = None) -> Assessor:
        """The assessor; with the tokenizer and the template that are loaded already, if there are any."""
        if model is not None:
            return Assessor(self, model.tokenizer, model.renderer)
        tokenizer = load_tokenizer(self.folder, self.spec.model.trust_remote_code)
        add_new_tokens(tokenizer, self.spec.model.new_tokens or ())
        return Assessor(self, tokenizer, ChatRenderer(tokenizer, self.template) if self.template else None)


@dataclass(frozen=True)
class Batch:
    """Rows of one source, with what is known of them all."""

    rows: list[RawRow]
    first: int
    """The first one's number, of all rows of the job."""
    format: DataFormat | None
    columns: Mapping[str, str]
    weight: float | None = None


@dataclass(frozen=True)
class Refused:
    """An unusable row."""

    problem: str


@dataclass(frozen=True)
class LeftOut:
    """A row that data.checks.overlength leaves out."""

    why: str


@dataclass(frozen=True)
class Kept:
    """The usable rows of a batch: what is spooled, what the split needs to know, and what is counted."""

    rows: pa.RecordBatch
    """SPOOL_SCHEMA."""
    remembered: Remembered
    truncated: int
    without_end: int
    """Rows that were not cut and whose last learned token ends no answer."""
    with_special_tokens: int
    not_alternating: int
    found: Counter[str]
    """Personal data, by kind."""


@dataclass(frozen=True)
class Assessed:
    """What became of a batch's rows."""

    others: list[tuple[int, Refused | LeftOut]]
    """Rows that are not kept, by their place in the batch, in order."""
    kept: Kept


@dataclass(frozen=True)
class _Usable:
    place: int
    example: Example
    found: Counter[str]
    whole: Encoded
    cut: Encoded


class Assessor:
    """Assesses rows for one job."""

    def __init__(self, recipe: Recipe, tokenizer: object, renderer: ChatRenderer | None) -> None:
        spec = recipe.spec
        self._recipe = recipe
        self._seed = spec.training.seed
        self._limit = spec.training.max_sequence_tokens
        self._overlength = spec.data.checks.overlength
        self._pii = spec.data.checks.pii
        self._sketches = spec.data.checks.near_duplicates.enabled
        self._renderer = renderer
        self._encoder = Encoder(tokenizer, renderer, spec.objective.sft.loss_on)
        self._special = special_token_pattern(tokenizer)
        self._ends = np.array(sorted(end_of_turn_ids(tokenizer)))

    def assess(self, batch: Batch) -> Assessed:
        """What becomes of each row.

        Raises:
            StageError: ChatTemplateMissing, UnsupportedModel, InvalidConfig: what no other row would change.
        """
        others: dict[int, Refused | LeftOut] = {}
        examples: dict[int, tuple[Example, Counter[str]]] = {}
        for place, raw in enumerate(batch.rows):
            try:
                example = self._example(raw, batch.format, batch.columns)
            except RowProblem as problem:
                others[place] = Refused(problem.text)
            else:
                examples[place] = self._searched(example)
        encoded = self._encoder.encode_all([example for example, _ in examples.values()])
        usable: list[_Usable] = []
        for (place, (example, found)), whole in zip(examples.items(), encoded, strict=True):
            try:
                if isinstance(whole, RowProblem):
                    raise whole
                usable.append(_Usable(place, example, found, whole, fit(whole, self._limit, self._overlength)))
            except RowProblem as problem:
                others[place] = Refused(problem.text)
            except Dropped as reason:
                others[place] = LeftOut(reason.text)
        return Assessed(sorted(others.items()), self._kept(batch, usable))

    def _searched(self, example: Example) -> tuple[Example, Counter[str]]:
        """The example, redacted if that is asked for, and what was found in it."""
        found: Counter[str] = Counter()
        if self._pii is PiiPolicy.IGNORE:
            return example, found
        clean = redacted_example(example, found)
        return clean if self._pii is PiiPolicy.REDACT else example, found

    def _kept(self, batch: Batch, usable: list[_Usable]) -> Kept:
        ids, labels = lists([row.cut.ids for row in usable]), lists([row.cut.labels for row in usable])
        self._check_vocabulary(usable)
        groups = [row.example.group for row in usable]
        asked = [row.example if isinstance(row.example, Conversation | Completion) else None for row in usable]
        cut = np.array([row.whole.length > len(row.cut.ids) for row in usable], bool)
        numbers = [batch.first + row.place for row in usable]
        columns = {
            "row": numbers,
            "source": [batch.rows[row.place].source for row in usable],
            "input_ids": ids,
            "labels": labels,
            "prompt_tokens": [row.cut.prompt_tokens for row in usable],
            "prompt": [example.prompt if example is not None else None for example in asked],
            "reference": [example.reference if example is not None else None for example in asked],
            "context": [_context(row.example) for row in usable],
            "copies": [copies(batch.weight, self._seed, number) for number in numbers],
        }
        said = [_said(row.example, group, row.whole) for row, group in zip(usable, groups, strict=True)]
        found: Counter[str] = Counter()
        for row in usable:
            found.update(row.found)
        return Kept(
            rows=pa.RecordBatch.from_arrays(
                [pa.array(columns[field.name], field.type) for field in SPOOL_SCHEMA], schema=SPOOL_SCHEMA
            ),
            remembered=Remembered(
                groups=np.array([group_of(group) for group in groups], np.uint64),
                contents=np.array([fingerprint(row.whole.ids.data) for row in usable], np.uint64),
                lengths=np.array([row.whole.length for row in usable], np.uint32),
                sketches=sketch(shingles(said)) if self._sketches else sketch([]),
            ),
            truncated=int(cut.sum()),
            without_end=int((~cut & ~self._end(ids, labels)).sum()),
            with_special_tokens=sum(
                example is not None and self._special.search(f"{group} {example.reference}") is not None
                for example, group in zip(asked, groups, strict=True)
            ),
            not_alternating=sum(
                isinstance(example, Conversation) and not alternates(example.messages) for example in asked
            ),
            found=found,
        )

    def _example(self, raw: RawRow, fmt: DataFormat | None, columns: Mapping[str, str]) -> Example:
        if raw.value is None or fmt is None:
            raise RowProblem(raw.problem or "not usable")
        example = to_example(raw.value, fmt, columns, self._renderer is not None)
        if isinstance(example, Conversation) and self._renderer is None:
            raise StageError(
                Reason.CHAT_TEMPLATE_MISSING,
                f"{raw.source}: the rows are conversations, and the tokenizer of {self._recipe.uri} has no chat template",
            )
        if isinstance(example, Tokenized) and (largest := max(example.ids)) >= self._recipe.vocabulary:
            raise RowProblem(
                f"{columns.get('input_ids', 'input_ids')}: token {largest}, and the model's embedding has "
                f"{self._recipe.vocabulary:,} rows: another tokenizer made them"
            )
        return example

    def _end(self, ids: pa.ListArray, labels: pa.ListArray) -> npt.NDArray[np.bool_]:
        """Per row, whether its last learned token is one that ends an answer."""
        values, bounds = flat(ids)
        learned = np.flatnonzero(flat(labels)[0] != IGNORED)
        last = learned[np.searchsorted(learned, bounds[1:]) - 1]
        return np.isin(values[last], self._ends)

    def _check_vocabulary(self, usable: list[_Usable]) -> None:
        for row in usable:
            largest = int(row.cut.ids.max())
            if largest >= self._recipe.vocabulary:
                raise StageError(
                    Reason.UNSUPPORTED_MODEL,
                    f"the tokenizer yields token {largest}, and the model's embedding has {self._recipe.vocabulary:,} rows: "
                    "they do not belong together",
                )


def _said(example: Example, group: str, whole: Encoded) -> str | Tokens:
    """What the row says, without system messages: those are often the same in every row.

    Args:
        group: the example's.
    """
    match example:
        case Tokenized():
            return whole.ids
        case Text():
            return example.text
    return f"{group}\n{example.reference}"


def _context(example: Example) -> str | None:
    return json.dumps([example.messages[:-1], example.tools]) if isinstance(example, Conversation) else None
