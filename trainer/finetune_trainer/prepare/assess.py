"""What becomes of a row: usable as tokens, unusable and why, or too long and left out. Nothing here counts or writes, so that several
processes may assess at a time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finetune_api.failures import Reason
from finetune_api.results import IGNORED
from finetune_api.spec import DataFormat, FineTuneJobSpec, PiiPolicy
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import ChatRenderer, end_of_turn_ids, load_tokenizer, special_token_pattern
from finetune_trainer.prepare.encode import Dropped, Encoded, Encoder, fit
from finetune_trainer.prepare.examples import Completion, Conversation, Example, Text, Tokenized, to_example
from finetune_trainer.prepare.model import BaseModel
from finetune_trainer.prepare.near import Tokens, shingles, sketch
from finetune_trainer.prepare.pii import redacted_example
from finetune_trainer.prepare.problems import RowProblem
from finetune_trainer.prepare.rows import RawRow
from finetune_trainer.prepare.split import group_of
from finetune_trainer.prepare.turns import alternates


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
        return Assessor(self, tokenizer, ChatRenderer(tokenizer, self.template) if self.template else None)


@dataclass(frozen=True)
class Batch:
    """Rows of one source, with what is known of them all."""

    rows: list[RawRow]
    format: DataFormat | None
    columns: Mapping[str, str]
    only_counting: bool = False
    """The job fails in any case: rows that are well formed need not be tokenised."""


@dataclass(frozen=True)
class Kept:
    """A usable row."""

    encoded: Encoded
    group: int
    content: int
    prompt: str | None
    reference: str | None
    context: str | None
    """JSON of the turns before the answer and of the tools, where the row has turns."""
    has_special_tokens: bool
    ends: bool
    """The last token is one that ends an answer, and is learned; or the row was cut."""
    alternates: bool
    found: Counter[str]
    """Personal data in it, by kind."""


@dataclass(frozen=True)
class Refused:
    """An unusable row."""

    problem: str


@dataclass(frozen=True)
class LeftOut:
    """A row that data.checks.overlength leaves out."""

    why: str


@dataclass(frozen=True)
class Passed:
    """A well-formed row of a job that fails for others."""


Outcome = Kept | Refused | LeftOut | Passed


@dataclass(frozen=True)
class Assessed:
    """The outcomes of a batch, and the sketches of the rows that are kept: (kept, 64) bytes, none where they are not asked for."""

    outcomes: list[Outcome]
    sketches: npt.NDArray[np.uint8] = field(default_factory=lambda: sketch([]))


class Assessor:
    """Assesses rows for one job."""

    def __init__(self, recipe: Recipe, tokenizer: object, renderer: ChatRenderer | None) -> None:
        spec = recipe.spec
        self._recipe = recipe
        self._limit = spec.training.max_sequence_tokens
        self._overlength = spec.data.checks.overlength
        self._pii = spec.data.checks.pii
        self._sketches = spec.data.checks.near_duplicates.enabled
        self._renderer = renderer
        self._encoder = Encoder(tokenizer, renderer, spec.objective.sft.loss_on)
        self._special = special_token_pattern(tokenizer)
        self._ends = end_of_turn_ids(tokenizer)

    def assess(self, batch: Batch) -> Assessed:
        """The outcome of each row.

        Raises:
            StageError: ChatTemplateMissing, UnsupportedModel, InvalidConfig: what no other row would change.
        """
        outcomes: dict[int, Outcome] = {}
        examples: dict[int, tuple[Example, Counter[str]]] = {}
        for number, raw in enumerate(batch.rows):
            try:
                example = self._example(raw, batch.format, batch.columns)
            except RowProblem as problem:
                outcomes[number] = Refused(problem.text)
            else:
                examples[number] = self._searched(example)
        if batch.only_counting:
            outcomes |= dict.fromkeys(examples, Passed())
            return Assessed([outcomes[number] for number in range(len(batch.rows))])
        encoded = self._encoder.encode_all([example for example, _ in examples.values()])
        texts: list[str | Tokens] = []
        for (number, (example, found)), whole in zip(examples.items(), encoded, strict=True):
            try:
                if isinstance(whole, RowProblem):
                    raise whole
                outcomes[number] = self._kept(example, found, whole)
            except RowProblem as problem:
                outcomes[number] = Refused(problem.text)
            except Dropped as reason:
                outcomes[number] = LeftOut(reason.text)
            else:
                texts.append(_said(example, whole))
        sketches = sketch(shingles(texts)) if self._sketches else sketch([])
        return Assessed([outcomes[number] for number in range(len(batch.rows))], sketches)

    def _searched(self, example: Example) -> tuple[Example, Counter[str]]:
        """The example, redacted if that is asked for, and what was found in it."""
        found: Counter[str] = Counter()
        if self._pii is PiiPolicy.IGNORE:
            return example, found
        clean = redacted_example(example, found)
        return clean if self._pii is PiiPolicy.REDACT else example, found

    def _kept(self, example: Example, found: Counter[str], whole: Encoded) -> Kept:
        encoded = fit(whole, self._limit, self._overlength)
        self._check_vocabulary(encoded)
        asked = example if isinstance(example, Conversation | Completion) else None
        group = example.group
        return Kept(
            encoded=encoded,
            group=group_of(group),
            content=int.from_bytes(hashlib.blake2b(whole.ids.tobytes(), digest_size=8).digest(), "little"),
            prompt=asked.prompt if asked is not None else None,
            reference=asked.reference if asked is not None else None,
            context=_context(example),
            has_special_tokens=asked is not None and bool(self._special.search(f"{group} {asked.reference}")),
            ends=whole.length > len(encoded.ids) or self._ends_with_end(encoded),
            alternates=not isinstance(example, Conversation) or alternates(example.messages),
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

    def _ends_with_end(self, encoded: Encoded) -> bool:
        learned = np.flatnonzero(encoded.labels != IGNORED)
        return int(encoded.ids[learned[-1]]) in self._ends

    def _check_vocabulary(self, encoded: Encoded) -> None:
        largest = int(encoded.ids.max())
        if largest >= self._recipe.vocabulary:
            raise StageError(
                Reason.UNSUPPORTED_MODEL,
                f"the tokenizer yields token {largest}, and the model's embedding has {self._recipe.vocabulary:,} rows: "
                "they do not belong together",
            )


def _said(example: Example, whole: Encoded) -> str | Tokens:
    """What the row says, without system messages: those are often the same in every row."""
    match example:
        case Tokenized():
            return whole.ids
        case Text():
            return example.text
    return f"{example.group}\n{example.reference}"


def _context(example: Example) -> str | None:
    return json.dumps([example.messages[:-1], example.tools]) if isinstance(example, Conversation) else None
