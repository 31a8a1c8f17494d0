"""The user's own prompts (``evaluation.generation.sources``): rows as in the training data, whose answers may be missing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune_api.failures import Reason
from finetune_api.names import prompts_slot
from finetune_api.results import PreparedPrompt
from finetune_api.spec import DataFormat, DataSource, FineTuneJobSpec, PiiPolicy
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.detect import Fields, check_columns, detect, with_format
from finetune_trainer.prepare.examples import FIELDS, Completion, Conversation, to_example
from finetune_trainer.prepare.model import BaseModel
from finetune_trainer.prepare.near import Hashes
from finetune_trainer.prepare.pii import redacted, redacted_example
from finetune_trainer.prepare.problems import Problems, RowProblem, discreet
from finetune_trainer.prepare.prompts import conversation_prompt, text_prompt
from finetune_trainer.prepare.rows import RawRow
from finetune_trainer.prepare.split import group_of
from finetune_trainer.prepare.turns import SHAREGPT_ROLES, text_of
from finetune_trainer.private import without_credentials
from finetune_trainer.sources.data import fetch_data
from finetune_trainer.text import plural
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)

FIELD = "evaluation.generation.sources"
QUESTION_FIELDS: Fields = {
    fmt: (required[:1], (*required[1:], *optional))
    for fmt, (required, optional) in FIELDS.items()
    if fmt is not DataFormat.TOKENIZED
}
"""As FIELDS, where only what is asked must be there."""
STAND_IN = "-"
"""Takes the place of an answer that a row has not, so that such a row is read as every other, and is taken out again."""


@dataclass
class Questions:
    """The prompts to be answered, and what stands in the sources."""

    problems: Problems
    prompts: list[PreparedPrompt] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    """Of each prompt, the fingerprint by which the split tells prompts apart."""
    rows: int = 0


def read_questions(ctx: StageContext, model: BaseModel) -> Questions | None:
    """Read and check all rows, and keep the first ``evaluation.generation.prompts``; None where the spec names no sources.

    Raises:
        StageError: InvalidData, TooFewRows, DatasetNotFound, ChatTemplateMissing, InvalidConfig, AccessDenied, BucketNotFound.
    """
    spec = ctx.snapshot.spec
    sources = spec.evaluation.generation.sources
    if sources is None:
        return None
    redact = spec.data.checks.pii is PiiPolicy.REDACT
    found = Questions(Problems(spec.data.checks.max_bad_rows, redact))
    with discreet(redact):
        _read(ctx, model, sources, found, redact)
    found.problems.check(found.rows)
    return found


def check_questions(sources: list[DataSource]) -> list[dict[str, str]]:
    """Each source's column mapping.

    Raises:
        StageError: InvalidConfig, as check_columns does.
    """
    return [check_columns(source, f"{FIELD}[{index}]") for index, source in enumerate(sources)]


def _read(ctx: StageContext, model: BaseModel, sources: list[DataSource], found: Questions, redact: bool) -> None:
    most = ctx.snapshot.spec.evaluation.generation.prompts
    for index, (source, mapping) in enumerate(zip(sources, check_questions(sources), strict=True)):
        before = found.rows
        for raw, fmt in _rows(ctx, source, index, mapping):
            number, found.rows = found.rows, found.rows + 1
            try:
                prompt, group = _prompt(raw, fmt, mapping, number, model, redact)
            except RowProblem as problem:
                found.problems.add(raw.source, problem.text)
                continue
            if len(found.prompts) < most:
                found.prompts.append(prompt)
                found.groups.append(group)
        if found.rows == before:
            raise StageError(Reason.TOO_FEW_ROWS, f"{FIELD}[{index}] ({without_credentials(source.uri)}) holds no rows")
        log.info("%s: %s", without_credentials(source.uri), plural(found.rows - before, "prompt"))


def warnings_of(questions: Questions, spec: FineTuneJobSpec, trained: Hashes) -> list[str]:
    """What is worth knowing of the prompts.

    Args:
        trained: fingerprints of the prompts that are trained on.
    """
    most, limit = spec.evaluation.generation.prompts, spec.training.max_sequence_tokens
    usable = questions.rows - questions.problems.count
    warnings = []
    if questions.problems.count:
        warnings.append(
            f"{plural(questions.problems.count, 'row')} of {FIELD} cannot be used and are left out; first: "
            f"{questions.problems.named[0][:160]}"
        )
    if usable > most:
        warnings.append(
            f"of {plural(usable, 'prompt')} in {FIELD} the first {most} are answered: raise evaluation.generation.prompts"
        )
    if known := int(np.isin(np.array(questions.groups, np.uint64), trained).sum()):
        warnings.append(
            f"{plural(known, 'prompt')} of {FIELD} stand in the training data too: the tuned model's scores on them are too good"
        )
    if long := sum(len(p.input_ids) > limit for p in questions.prompts):
        warnings.append(
            f"{plural(long, 'prompt')} of {FIELD} longer than training.maxSequenceTokens ({limit:,}): their beginning is left out"
        )
    return warnings


def _rows(
    ctx: StageContext, source: DataSource, index: int, columns: Mapping[str, str]
) -> Iterator[tuple[RawRow, DataFormat | None]]:
    """A source's rows and their format."""
    ctx.reporter.report(activity="Downloading")
    moved, slot = ctx.reporter.transfer("download"), prompts_slot(index)
    files = wait_until_available(ctx, lambda: fetch_data(ctx, source, slot, ctx.work_dir / "data" / slot, moved))
    ctx.reporter.report(activity="Checking")
    where = f"{FIELD}[{index}]"
    yield from with_format(
        source, where, files, columns, lambda rows: detect(source, where, columns, rows, QUESTION_FIELDS)
    )


def _prompt(
    raw: RawRow, fmt: DataFormat | None, columns: Mapping[str, str], number: int, model: BaseModel, redact: bool
) -> tuple[PreparedPrompt, int]:
    if raw.value is None or fmt is None:
        raise RowProblem(raw.problem or "not usable")
    if fmt is DataFormat.TEXT:
        name = columns.get("text", "text")
        text = text_of(raw.value.get(name), name)
        text = redacted(text, Counter()) if redact else text
        return text_prompt(number, text, "", model.tokenizer), group_of(text)
    row, answered = with_answer(raw.value, fmt, columns)
    example = to_example(row, fmt, columns, model.renderer is not None)
    example = redacted_example(example, Counter()) if redact else example
    reference = ""
    if isinstance(example, Conversation | Completion) and answered:
        reference = example.reference
    if isinstance(example, Completion):
        return text_prompt(number, example.prompt, reference, model.tokenizer), group_of(example.group)
    assert isinstance(example, Conversation)  # the other formats have no questions
    if model.renderer is None:
        raise StageError(
            Reason.CHAT_TEMPLATE_MISSING,
            f"{raw.source}: the rows are conversations, and the tokenizer of {model.uri} has no chat template",
        )
    asked = example.messages[:-1]
    if not asked:
        raise RowProblem("expected a turn before the answer, found none")
    prompt = conversation_prompt(
        number, example.prompt, reference, asked, example.tools, model.tokenizer, model.renderer
    )
    return prompt, group_of(example.group)


def with_answer(row: Mapping[str, Any], fmt: DataFormat, columns: Mapping[str, str]) -> tuple[Mapping[str, Any], bool]:
    """The row with STAND_IN for an answer that it has not, and whether it has one."""

    def value(name: str) -> Any:
        return row.get(columns.get(name, name))

    match fmt:
        case DataFormat.MESSAGES | DataFormat.SHAREGPT:
            name = "messages" if fmt is DataFormat.MESSAGES else "conversations"
            turns = value(name)
            if not isinstance(turns, list) or not turns or _is_answer(turns[-1]):
                return row, True
            return {**row, columns.get(name, name): [*turns, {"role": "assistant", "content": STAND_IN}]}, False
        case DataFormat.PROMPT_COMPLETION:
            name = "completion"
            given: Any = [{"role": "assistant", "content": STAND_IN}] if isinstance(value("prompt"), list) else STAND_IN
        case _:
            name, given = "output", STAND_IN
    answer = value(name)
    if _is_blank(answer):
        return {**row, columns.get(name, name): given}, False
    return row, True


def _is_blank(answer: object) -> bool:
    """No answer; or an empty one, as a text or as the one message there is."""
    if isinstance(answer, str):
        return not answer.strip()
    return answer in (None, [], [{"role": "assistant", "content": ""}])


def _is_answer(turn: object) -> bool:
    """Also what is no turn: to_example says what is wrong with it."""
    if not isinstance(turn, dict):
        return True
    return "assistant" in (turn.get("role"), SHAREGPT_ROLES.get(str(turn.get("from"))))
