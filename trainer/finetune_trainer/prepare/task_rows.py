"""What models are asked by ``evaluation.tasks``, tokenised as lm-eval does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import TypeAdapter

from finetune_api.answering import prompt_room
from finetune_api.failures import Reason
from finetune_api.results import IGNORED, TaskPrompt
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.store import ROW_GROUP_ROWS, SCHEMA, RowWriter, lists
from finetune_trainer.tasks.child import FIELD
from finetune_trainer.tasks.protocol import Requests

LEAST_PROMPT = 16
"""Tokens: what is left of a prompt that is cut to less asks nothing."""
PROMPTS = TypeAdapter(list[TaskPrompt])


def write_requests(
    requests: Requests, tokenizer: Any, rows: Path, prompts: Path, positions: int | None, limit: int
) -> int:
    """Both files that training reads; how many requests lose their beginning.

    Args:
        positions: the model's, where its config.json tells them.
        limit: training.maxSequenceTokens.

    Raises:
        StageError: InvalidConfig, as of :func:`cut_prompts`.
    """
    cut = write_rows(rows, requests, tokenizer, limit)
    asked = [
        TaskPrompt(input_ids=encoded(tokenizer, g.context), max_new_tokens=g.max_new_tokens, until=list(g.until))
        for g in requests.generated
    ]
    prompts.write_bytes(PROMPTS.dump_json(asked, by_alias=True))
    return cut + cut_prompts(asked, positions, limit)


def cut_prompts(prompts: Sequence[TaskPrompt], positions: int | None, limit: int) -> int:
    """How many of them do not fit as a whole.

    Raises:
        StageError: InvalidConfig, where hardly anything of one would be left.
    """
    cut = 0
    for prompt in prompts:
        room = prompt_room(positions, prompt.max_new_tokens, limit)
        if len(prompt.input_ids) > room and positions is not None and positions - prompt.max_new_tokens < LEAST_PROMPT:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"{FIELD}: a prompt of {len(prompt.input_ids):,} tokens is to be answered with up to {prompt.max_new_tokens:,}, and the model has "
                f"{positions:,} positions: less than {LEAST_PROMPT} are left for the prompt. Leave the task out, or ask for less in a task of "
                "your own (generation_kwargs.max_gen_toks).",
            )
        cut += len(prompt.input_ids) > room
    return cut


def write_rows(path: Path, requests: Requests, tokenizer: Any, limit: int) -> int:
    """A row for each continuation, which alone is learned of it; how many were cut to ``limit`` tokens."""
    cut, rows = 0, []
    with RowWriter(path, SCHEMA) as writer:
        for number, request in enumerate(requests.continuations):
            context, continuation = encoded_pair(tokenizer, request.context, request.continuation)
            ids = [*context, *continuation][-limit:]
            cut += len(context) + len(continuation) > limit
            read = max(1, len(ids) - len(continuation))  # nothing predicts the first token
            rows.append((number, ids, read))
            if len(rows) == ROW_GROUP_ROWS:
                writer.write(_table(rows))
                rows = []
        if rows:
            writer.write(_table(rows))
    return cut


def _table(rows: Sequence[tuple[int, list[int], int]]) -> pa.Table:
    """Of number, ids and how many of them are only read."""
    ids = [np.array(tokens, np.int32) for _, tokens, _ in rows]
    labels = [np.where(np.arange(len(tokens)) < read, IGNORED, tokens).astype(np.int32) for _, tokens, read in rows]
    return pa.table(
        {
            "row": [number for number, _, _ in rows],
            "source": [f"task:{number}" for number, _, _ in rows],
            "input_ids": lists(ids),
            "labels": lists(labels),
            "prompt_tokens": [read for _, _, read in rows],
        }
    )


def encoded_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """As lm-eval's TemplateLM: white space at the context's end belongs to the continuation, which is what the whole has more."""
    if not context:
        first = prefix_token(tokenizer)
        ids = list(tokenizer(continuation, add_special_tokens=False)["input_ids"])
        return ([first], ids) if first != ids[0] else (ids[:1], ids[1:])
    bare = context.rstrip()
    before = encoded(tokenizer, bare)
    return before, encoded(tokenizer, context + continuation)[len(before) :]


def encoded(tokenizer: Any, text: str) -> list[int]:
    """As lm-eval's HFLM: with the special tokens that the tokenizer adds, unless the text begins with BOS itself."""
    begun = text.startswith(tokenizer.decode(prefix_token(tokenizer)))
    return list(tokenizer(text, **({"add_special_tokens": False} if begun else {}))["input_ids"])


def prefix_token(tokenizer: Any) -> int:
    """BOS, or EOS where there is none."""
    return int(tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)
