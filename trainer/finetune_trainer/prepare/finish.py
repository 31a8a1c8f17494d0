"""From the spooled rows to the prepared files: split, counts, hash, prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

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
from finetune_trainer.prepare.encode import Encoded
from finetune_trainer.prepare.near import SLOTS, Labels, clusters, joined
from finetune_trainer.prepare.prompts import conversation_prompt, text_prompt
from finetune_trainer.prepare.questions import Questions, warnings_of
from finetune_trainer.prepare.split import held_out_rows
from finetune_trainer.prepare.store import SCHEMA, DataHash, Index, RowWriter, Side, read_spool
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


def finish(
    spec: FineTuneJobSpec,
    checked: Checked,
    tokenizer: Any,
    renderer: ChatRenderer | None,
    folder: Path,
    questions: Questions | None = None,
    preview_rows: int = PREVIEW_ROWS,
) -> Prepared:
    """Split the rows and write the files.

    Args:
        questions: what is answered instead of held-out prompts.

    Raises:
        StageError: TooFewRows.
    """
    near = _near(spec, checked.index)
    held_out = _split(spec, checked, near)
    data_hash = DataHash()
    sides = (Side(), Side())
    prompts: list[PreparedPrompt] = []
    preview: list[PreviewRow] = []
    most = TOKENIZER_PROMPTS if questions is not None else max(spec.evaluation.generation.prompts, TOKENIZER_PROMPTS)
    with RowWriter(folder / PREPARED_TRAIN, SCHEMA) as train, RowWriter(folder / PREPARED_HELD_OUT, SCHEMA) as held:
        for row, is_held_out in zip(read_spool(checked.spool), held_out.tolist(), strict=True):
            encoded = Encoded(row["input_ids"], row["labels"], row["prompt_tokens"], len(row["input_ids"]))
            if is_held_out and len(prompts) < most:
                prompts.append(_prompt(row, encoded, tokenizer, renderer))
            if not is_held_out and row["copies"] and len(preview) < preview_rows:
                preview.append(_preview(row["source"], encoded, tokenizer))
            for _ in range(1 if is_held_out else row["copies"]):
                sides[is_held_out].add(encoded)
                data_hash.add(is_held_out, row["row"], encoded.ids, encoded.labels)
                (held if is_held_out else train).write({name: row[name] for name in SCHEMA.names}, len(encoded.ids))
    if not sides[0].rows:
        raise StageError(Reason.TOO_FEW_ROWS, "no training row is left by the weights of data.train: raise them")
    about_questions: list[str] = []
    if questions is not None:
        prompts = [*questions.prompts, *(prompt.model_copy(update={"answered": False}) for prompt in prompts)]
        trained = {group for group, held in zip(checked.index.groups, held_out.tolist(), strict=True) if not held}
        about_questions = warnings_of(questions, spec, trained)
    _write(folder / PREPARED_PROMPTS, prompts)
    _write(folder / PREPARED_PREVIEW, preview)
    data = DataSummary(
        rows=checked.rows,
        train_rows=sides[0].rows,
        held_out_rows=sides[1].rows,
        bad_rows=checked.problems.count,
        truncated_rows=checked.truncated,
        dropped_rows=checked.dropped,
        duplicate_rows=_duplicates(checked.index),
        formats=dict(sorted(checked.formats.items())),
        train_tokens=sides[0].tokens,
        train_target_tokens=sides[0].targets,
        held_out_tokens=sides[1].tokens,
        held_out_target_tokens=sides[1].targets,
        held_out_overlap_rows=_overlap(np.array(checked.index.groups, np.uint64), held_out),
        near_duplicate_rows=_near_duplicates(checked.index, near, held_out),
        held_out_near_rows=_near_leaks(checked.index, near, held_out),
        pii=dict(sorted(checked.found.items())),
        tokens=_percentiles(checked.index),
    )
    references = [prompt.reference for prompt in prompts if prompt.answered]
    warnings = _warnings(spec, data, checked, held_out)
    return Prepared(folder, data, data_hash.hexdigest(), references, preview, warnings + about_questions)


def _write(path: Path, items: Sequence[ApiModel]) -> None:
    text = json.dumps([item.to_json_dict() for item in items], ensure_ascii=False, indent=1)
    path.write_text(text, encoding="utf-8")


def _preview(source: str, encoded: Encoded, tokenizer: Any) -> PreviewRow:
    ids = encoded.ids[:PREVIEW_TOKENS].tolist()
    learned = (encoded.labels[: len(ids)] != IGNORED).tolist()
    return PreviewRow(
        source=source,
        length=len(encoded.ids),
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
    if not asked.enabled or not len(index.groups):
        return None
    sketches = np.frombuffer(index.sketches, np.uint8).reshape(-1, SLOTS)
    return clusters(sketches, np.array(index.contents, np.uint64), asked.threshold)


def _split(spec: FineTuneJobSpec, checked: Checked, near: Labels | None) -> Mask:
    index = checked.index
    if spec.data.held_out.fraction is not None:
        if not len(index.groups):
            raise StageError(Reason.TOO_FEW_ROWS, f"none of {plural(checked.rows, 'row')} is left: {_losses(checked)}")
        return _drawn(np.array(index.groups, np.uint64), near, spec.data.held_out.fraction, spec.training.seed)
    held_out = np.array(index.from_held_out, bool)
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


def _prompt(row: dict[str, Any], encoded: Encoded, tokenizer: Any, renderer: ChatRenderer | None) -> PreparedPrompt:
    """What the models are asked, and the answer that stands in the data. Of tokens: what comes before the last answer. Of a text: its
    first quarter, and the rest."""
    if row["context"] is not None:
        assert renderer is not None  # the row was rendered with it
        messages, tools = json.loads(row["context"])
        return conversation_prompt(row["row"], row["prompt"], row["reference"], messages, tools, tokenizer, renderer)
    prompt, reference = row["prompt"], row["reference"]
    if prompt is None and encoded.prompt_tokens:
        ids = encoded.ids[: encoded.prompt_tokens].tolist()
        asked = tokenizer.decode(ids, skip_special_tokens=True)
        answer = tokenizer.decode(encoded.ids[encoded.prompt_tokens :].tolist(), skip_special_tokens=True)
        return PreparedPrompt(
            row=row["row"], prompt=asked, reference=answer, text=tokenizer.decode(ids), input_ids=ids, from_tokens=True
        )
    if prompt is None:
        count = max(1, len(encoded.ids) // 4)
        prompt = tokenizer.decode(encoded.ids[:count].tolist(), skip_special_tokens=True)
        reference = tokenizer.decode(encoded.ids[count:].tolist(), skip_special_tokens=True)
    return text_prompt(row["row"], prompt, reference, tokenizer)


def _duplicates(index: Index) -> int:
    held_out = np.array(index.from_held_out, bool)
    contents = np.array(index.contents, np.uint64)
    return sum(int(len(side) - len(np.unique(side))) for side in (contents[held_out], contents[~held_out]))


def _near_duplicates(index: Index, near: Labels | None, held_out: Mask) -> int:
    """Training rows with another content that are nearly the same as an earlier one."""
    if near is None:
        return 0
    contents = np.unique(np.array(index.contents, np.uint64)[~held_out])
    return int(len(contents) - len(np.unique(near[~held_out])))


def _near_leaks(index: Index, near: Labels | None, held_out: Mask) -> int:
    if near is None:
        return 0
    contents = np.array(index.contents, np.uint64)
    leaked = np.isin(near[held_out], near[~held_out]) & ~np.isin(contents[held_out], contents[~held_out])
    return int(leaked.sum())


def _percentiles(index: Index) -> LengthPercentiles:
    lengths = np.array(index.lengths, np.int64)
    p50, p95, p99 = (int(p) for p in np.percentile(lengths, [50, 95, 99], method="inverted_cdf"))
    return LengthPercentiles(p50=p50, p95=p95, p99=p99, max=int(lengths.max()))


def _warnings(spec: FineTuneJobSpec, data: DataSummary, checked: Checked, held_out: Mask) -> list[str]:
    limit = spec.training.max_sequence_tokens
    warnings = []
    if len(checked.index.groups) < FEW_ROWS:
        warnings.append(
            f"only {plural(len(checked.index.groups), 'usable row')}: under {FEW_ROWS} a prompt with examples often does as "
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
        rows, prompts = _overlap(np.array(checked.index.contents, np.uint64), held_out), data.held_out_overlap_rows
        if rows or prompts:
            warnings.append(
                f"held-out sources overlap with training: {plural(rows, 'row')} stand in both, {plural(prompts, 'row')} ask a prompt "
                "that is trained on; the held-out loss is too good"
            )
    return warnings


def _overlap(values: npt.NDArray[np.uint64], held_out: Mask) -> int:
    """How many held-out rows have a value that a training row has too."""
    return int(np.isin(values[held_out], values[~held_out]).sum())
