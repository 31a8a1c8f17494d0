"""From the spooled rows to the prepared files: split, counts, hash, prompts."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.base import ApiModel
from finetune_api.failures import Reason
from finetune_api.results import (
    IGNORED,
    PREPARED_HELD_OUT,
    PREPARED_PREVIEW,
    PREPARED_PROMPTS,
    PREPARED_TRAIN,
    DataSummary,
    LengthPercentiles,
    PreparedPrompt,
    PreviewRow,
)
from finetune_api.spec import FineTuneJobSpec, PiiPolicy
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import ChatRenderer
from finetune_trainer.prepare.check import Checked
from finetune_trainer.prepare.near import Labels, clusters, joined
from finetune_trainer.prepare.prompts import asked_beyond_answers, conversation_prompt, text_prompt
from finetune_trainer.prepare.questions import Questions, warnings_of
from finetune_trainer.prepare.split import held_out_rows
from finetune_trainer.prepare.store import SCHEMA, Index, Remembered, RowWriter, Side, data_hash
from finetune_trainer.text import plural

FEW_ROWS = 100
FEW_HELD_OUT = 30
PREVIEW_ROWS, PREVIEW_TOKENS = 3, 512
TOKENIZER_PROMPTS = 3
"""Prompts that are kept however few are to be answered: on them later stages check that their tokenizer is this one."""
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Prepared:
    """The prepared files below ``folder``, and what stands in them."""

    folder: Path
    data: DataSummary
    data_hash: str
    references: list[str]
    """What the prompts' answers are compared with."""
    preview: list[PreviewRow]
    warnings: list[str]
    occurrences: Counter[int] = field(default_factory=Counter)
    """How often trained tokens stand in the training rows."""


def finish(
    spec: FineTuneJobSpec,
    checked: Checked,
    tokenizer: Any,
    renderer: ChatRenderer | None,
    folder: Path,
    questions: Questions | None = None,
    preview_rows: int = PREVIEW_ROWS,
    trained_ids: Sequence[int] = (),
) -> Prepared:
    """Split the rows and write the files.

    Args:
        questions: what is answered instead of held-out prompts.
        trained_ids: tokens that are counted.

    Raises:
        StageError: TooFewRows.
    """
    near = _near(spec, checked.index)
    held_out = _split(spec, checked, near)
    sides = (Side(), Side())
    prompts: list[PreparedPrompt] = []
    preview: list[PreviewRow] = []
    occurrences: Counter[int] = Counter()
    most = TOKENIZER_PROMPTS if questions is not None else max(spec.evaluation.generation.prompts, TOKENIZER_PROMPTS)
    begin = 0
    with (
        pq.ParquetFile(checked.spool) as spool,
        RowWriter(folder / PREPARED_TRAIN, SCHEMA) as train,
        RowWriter(folder / PREPARED_HELD_OUT, SCHEMA) as held,
    ):
        for number in range(spool.num_row_groups):
            rows = spool.read_row_group(number, [*SCHEMA.names, "copies"])
            is_held_out = held_out[begin : begin + rows.num_rows]
            begin += rows.num_rows
            copies = np.where(is_held_out, 0, rows.column("copies").to_numpy())
            asked, trained = np.flatnonzero(is_held_out), np.repeat(np.arange(rows.num_rows), copies)
            if len(asked) and len(prompts) < most:
                whole = spool.read_row_group(number)
                prompts += [_prompt(_row(whole, i), tokenizer, renderer) for i in asked[: most - len(prompts)].tolist()]
            first = np.flatnonzero(copies)[: preview_rows - len(preview)].tolist()
            preview += [_preview(_row(rows, i), tokenizer) for i in first]
            if trained_ids:
                occurrences.update(count_tokens(rows, copies, trained_ids))
            for side, writer, chosen in zip(sides, (train, held), (trained, asked), strict=True):
                side.add(rows, chosen)
                writer.write(rows.select(SCHEMA.names), chosen)
    if not sides[0].rows:
        raise StageError(Reason.TOO_FEW_ROWS, "no training row is left by the weights of data.train: raise them")
    index = checked.index.all
    about_questions: list[str] = []
    if questions is not None:
        prompts = [*questions.prompts, *(prompt.model_copy(update={"answered": False}) for prompt in prompts)]
        about_questions = warnings_of(questions, spec, index.groups[~held_out])
    _write(folder / PREPARED_PROMPTS, prompts)
    _write(folder / PREPARED_PREVIEW, preview)
    data = DataSummary(
        rows=checked.rows,
        train_rows=sides[0].rows,
        held_out_rows=sides[1].rows,
        bad_rows=checked.problems.count,
        truncated_rows=checked.truncated,
        dropped_rows=checked.dropped,
        duplicate_rows=_duplicates(index, checked.index.from_held_out),
        formats=dict(sorted(checked.formats.items())),
        train_tokens=sides[0].tokens,
        train_target_tokens=sides[0].targets,
        held_out_tokens=sides[1].tokens,
        held_out_target_tokens=sides[1].targets,
        held_out_overlap_rows=_overlap(index.groups, held_out),
        near_duplicate_rows=_near_duplicates(index, near, held_out),
        held_out_near_rows=_near_leaks(index, near, held_out),
        pii=dict(sorted(checked.found.items())),
        tokens=_percentiles(index.lengths),
    )
    references = [prompt.reference for prompt in prompts if prompt.answered]
    warnings = _warnings(spec, data, checked, held_out)
    if renderer is not None and any(prompt.messages for prompt in prompts) and (more := asked_beyond_answers(renderer)):
        warnings.append(
            f"the chat template asks a model with {more!r} before an answer, which stands in no row: the tuned model answers otherwise than "
            "it was trained; set data.chatTemplate to one that writes it in rows too"
        )
    return Prepared(folder, data, data_hash(sides), references, preview, warnings + about_questions, occurrences)


def count_tokens(rows: pa.Table, copies: npt.NDArray[np.int64], wanted: Sequence[int]) -> Counter[int]:
    """How often tokens stand in rows that are written so many times."""
    ids = rows.column("input_ids").combine_chunks()
    values = ids.flatten().to_numpy(zero_copy_only=False)
    times = np.repeat(copies, ids.value_lengths().to_numpy(zero_copy_only=False))
    found = np.isin(values, wanted)
    numbers, places = np.unique(values[found], return_inverse=True)
    counts = np.bincount(places, weights=times[found], minlength=len(numbers)).astype(int)
    return Counter(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))


def _write(path: Path, items: Sequence[ApiModel]) -> None:
    text = json.dumps([item.to_json_dict() for item in items], ensure_ascii=False, indent=1)
    path.write_text(text, encoding="utf-8")


def _row(rows: pa.Table, place: int) -> dict[str, Any]:
    row: dict[str, Any] = rows.slice(place, 1).to_pylist()[0]
    return row


def _preview(row: dict[str, Any], tokenizer: Any) -> PreviewRow:
    ids = row["input_ids"][:PREVIEW_TOKENS]
    learned = [label != IGNORED for label in row["labels"][:PREVIEW_TOKENS]]
    return PreviewRow(
        source=row["source"],
        length=len(row["input_ids"]),
        input_ids=ids,
        tokens=[tokenizer.decode([token]) for token in ids],
        learned=[False, *learned[1:]],
    )


def total_steps(spec: FineTuneJobSpec, train_rows: int) -> int:
    """Optimizer steps: as asked for, or ⌈epochs × rows ÷ global batch⌉."""
    length = spec.training.length
    if length.steps is not None:
        return length.steps
    assert length.epochs is not None
    return math.ceil(length.epochs * train_rows / spec.training.global_batch_sequences)


def _near(spec: FineTuneJobSpec, index: Index) -> Labels | None:
    """A label per row, the same for rows that are nearly the same; None where that is not asked for."""
    asked = spec.data.checks.near_duplicates
    if not asked.enabled or not len(index):
        return None
    return clusters(index.all.sketches, index.all.contents, asked.threshold)


def _split(spec: FineTuneJobSpec, checked: Checked, near: Labels | None) -> Mask:
    index = checked.index
    if spec.data.held_out.fraction is not None:
        if not len(index):
            raise StageError(Reason.TOO_FEW_ROWS, f"none of {plural(checked.rows, 'row')} is left: {_losses(checked)}")
        return _drawn(index.all.groups, near, spec.data.held_out.fraction, spec.training.seed)
    held_out = index.from_held_out
    for name, count in (("data.train", int((~held_out).sum())), ("data.heldOut.sources", int(held_out.sum()))):
        if not count:
            raise StageError(Reason.TOO_FEW_ROWS, f"no row of {name} is left: {_losses(checked)}")
    return held_out


def _drawn(groups: npt.NDArray[np.uint64], near: Labels | None, fraction: float, seed: int) -> Mask:
    """Held out are whole prompts, and with them the rows that are nearly the same. Rows made from one template may all hang together: where
    less than half of what is asked for could be held out, prompts are drawn alone, and what leaks is counted."""
    by_prompt = held_out_rows(groups, fraction, seed)
    if near is None:
        return by_prompt
    whole = joined(groups, near)
    if len(np.unique(whole)) < 2:
        return by_prompt
    apart = held_out_rows(whole, fraction, seed)
    return apart if 0.5 <= apart.sum() / by_prompt.sum() <= 2 else by_prompt


def _losses(checked: Checked) -> str:
    return f"{checked.problems.count:,} cannot be used, {checked.dropped:,} dropped by data.checks.overlength"


def _prompt(row: dict[str, Any], tokenizer: Any, renderer: ChatRenderer | None) -> PreparedPrompt:
    """What the models are asked, and the answer that stands in the data. Of tokens: what comes before the last answer. Of a text: its
    first quarter, and the rest."""
    if row["context"] is not None:
        assert renderer is not None  # the row was rendered with it
        messages, tools = json.loads(row["context"])
        return conversation_prompt(row["row"], row["prompt"], row["reference"], messages, tools, tokenizer, renderer)
    prompt, reference = row["prompt"], row["reference"]
    every = row["input_ids"]
    if prompt is None and row["prompt_tokens"]:
        ids = every[: row["prompt_tokens"]]
        asked = tokenizer.decode(ids, skip_special_tokens=True)
        answer = tokenizer.decode(every[len(ids) :], skip_special_tokens=True)
        return PreparedPrompt(
            row=row["row"], prompt=asked, reference=answer, text=tokenizer.decode(ids), input_ids=ids, from_tokens=True
        )
    if prompt is None:
        count = max(1, len(every) // 4)
        prompt = tokenizer.decode(every[:count], skip_special_tokens=True)
        reference = tokenizer.decode(every[count:], skip_special_tokens=True)
    return text_prompt(row["row"], prompt, reference, tokenizer)


def _duplicates(index: Remembered, from_held_out: Mask) -> int:
    sides = (index.contents[from_held_out], index.contents[~from_held_out])
    return sum(int(len(side) - len(np.unique(side))) for side in sides)


def _near_duplicates(index: Remembered, near: Labels | None, held_out: Mask) -> int:
    """Training rows with another content that are nearly the same as an earlier one."""
    if near is None:
        return 0
    contents = np.unique(index.contents[~held_out])
    return int(len(contents) - len(np.unique(near[~held_out])))


def _near_leaks(index: Remembered, near: Labels | None, held_out: Mask) -> int:
    if near is None:
        return 0
    contents = index.contents
    leaked = np.isin(near[held_out], near[~held_out]) & ~np.isin(contents[held_out], contents[~held_out])
    return int(leaked.sum())


def _percentiles(lengths: npt.NDArray[np.uint32]) -> LengthPercentiles:
    p50, p95, p99 = (int(p) for p in np.percentile(lengths, [50, 95, 99], method="inverted_cdf"))
    return LengthPercentiles(p50=p50, p95=p95, p99=p99, max=int(lengths.max()))


def _warnings(spec: FineTuneJobSpec, data: DataSummary, checked: Checked, held_out: Mask) -> list[str]:
    limit = spec.training.max_sequence_tokens
    warnings = []
    if len(checked.index) < FEW_ROWS:
        warnings.append(
            f"only {plural(len(checked.index), 'usable row')}: under {FEW_ROWS} a prompt with examples often does as "
            "well; else train 5 to 10 epochs and watch the held-out loss"
        )
    elif data.held_out_rows < FEW_HELD_OUT:
        warnings.append(
            f"only {plural(data.held_out_rows, 'held-out row')}: with fewer than {FEW_HELD_OUT} small differences of the held-out loss mean "
            "nothing; hold out more (data.heldOut)"
        )
    if data.bad_rows:
        warnings.append(
            f"{plural(data.bad_rows, 'row')} cannot be used and are left out; first: {checked.problems.named[0][:160]}"
        )
    if data.dropped_rows:
        warnings.append(
            f"{plural(data.dropped_rows, 'row')} dropped: longer than training.maxSequenceTokens ({limit:,})"
        )
    if data.truncated_rows:
        warnings.append(f"{plural(data.truncated_rows, 'row')} truncated at {limit:,} tokens")
    if data.duplicate_rows:
        warnings.append(f"{plural(data.duplicate_rows, 'exact duplicate')} among the rows")
    if data.near_duplicate_rows:
        warnings.append(
            f"{plural(data.near_duplicate_rows, 'training row')} nearly the same as another one (data.checks.nearDuplicates)"
        )
    if data.held_out_near_rows:
        warnings.append(
            f"{plural(data.held_out_near_rows, 'held-out row')} nearly the same as a training row: the held-out loss is too good"
        )
    if data.pii:
        found = ", ".join(f"{kind} {count:,}" for kind, count in data.pii.items())
        done = "replaced" if spec.data.checks.pii is PiiPolicy.REDACT else "found, and left in place"
        warnings.append(f"personal data {done}: {found}")
    if checked.without_end:
        warnings.append(
            f"{plural(checked.without_end, 'row')} of token ids without an end-of-turn or EOS token that is learned at the end: the tuned "
            "model may not stop"
        )
    if checked.not_alternating:
        warnings.append(
            f"{plural(checked.not_alternating, 'conversation')} in which user and assistant do not take turns, the user first"
        )
    if checked.with_special_tokens:
        warnings.append(
            f"{plural(checked.with_special_tokens, 'row')} with the tokenizer's special tokens (such as an end of turn) inside a text: "
            "the model reads them as such"
        )
    if len(data.formats) > 1:
        warnings.append("formats are mixed: " + ", ".join(f"{name} {count:,}" for name, count in data.formats.items()))
    if spec.data.held_out.sources is not None:
        rows, prompts = _overlap(checked.index.all.contents, held_out), data.held_out_overlap_rows
        if rows or prompts:
            warnings.append(
                f"held-out sources overlap with training: {plural(rows, 'row')} stand in both, {plural(prompts, 'row')} ask a prompt "
                "that is trained on; the held-out loss is too good"
            )
    return warnings


def _overlap(values: npt.NDArray[np.uint64], held_out: Mask) -> int:
    """How many held-out rows have a value that a training row has too."""
    return int(np.isin(values[held_out], values[~held_out]).sum())
