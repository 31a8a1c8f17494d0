"""Rows end to end in one sequence, without padding and without seeing each other (Krell et al., 2021, arXiv:2107.02027).

Positions begin anew with each row, from which transformers makes an attention mask of one block a row (masking_utils,
``find_packed_sequence_indices``). Whether a model goes by that is tried on the model itself before training.
"""

from __future__ import annotations

import heapq
import inspect
import math
from collections.abc import Sequence
from typing import Any

import torch

from finetune_api.results import IGNORED
from finetune_trainer.train.device import Compute
from finetune_trainer.train.evaluate import inference
from finetune_trainer.train.loss import LearnedTokenLoss
from finetune_trainer.train.rows import Batch, Rows

TRIED_ROWS, TRIED_TOKENS = 100, 24
"""The longest two of these, to find out whether a model keeps them apart."""
SAME, LIKE = 1e-4, 0.1
"""Most that a token's NLL may differ: with other rows before it in the same place (nothing but what it sees may change it), and alone
(other sums, in half precision)."""

Sequences = list[list[int]]
"""Of row ids."""


def share_out(lengths: Sequence[int], capacity: int, sequences: int) -> Sequences | None:
    """Which rows (by index) stand in each sequence, as evenly as may be: the longest first, each where the fewest tokens are (Graham's LPT
    rule). None where one does not fit."""
    filled = [(0, number) for number in range(sequences)]
    found: Sequences = [[] for _ in range(sequences)]
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        tokens, number = filled[0]
        if tokens + lengths[index] > capacity:
            return None
        heapq.heapreplace(filled, (tokens + lengths[index], number))
        found[number].append(index)
    return found


def pack(ids: Sequence[int], lengths: Sequence[int], capacity: int, together: int) -> list[Sequences]:
    """A step's rows in the fewest micro-batches of ``together`` sequences (over all ranks) of at most ``capacity`` tokens.

    Args:
        lengths: tokens of each row; none has more than ``capacity``.
    """
    count = max(1, math.ceil(sum(lengths) / (capacity * together)))
    while (found := share_out(lengths, capacity, count * together)) is None:
        count += 1
    named = [[ids[i] for i in sequence] for sequence in found]
    return [named[start : start + together] for start in range(0, len(named), together)]


def collate_packed(rows: Rows, sequences: Sequences, pad_id: int) -> Batch:
    """``input_ids``, ``position_ids`` and ``labels``: int64, shape (sequences, longest). No row predicts the next one's first token; padding at
    the end is a row of its own of which nothing is learned.

    Without rows it is two tokens of which nothing is learned.
    """
    lengths = [sum(rows.length(i) for i in sequence) for sequence in sequences] or [0]
    longest = max(2, *lengths)
    shape = (max(1, len(sequences)), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.long),
        "position_ids": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED, dtype=torch.long),
    }
    for line in range(shape[0]):
        start = 0
        for index in sequences[line] if sequences else []:
            part = slice(start, start + rows.length(index))
            batch["input_ids"][line, part] = torch.tensor(rows.ids(index))
            batch["position_ids"][line, part] = torch.arange(rows.length(index))
            batch["labels"][line, part] = torch.tensor(rows.labels(index))
            batch["labels"][line, start] = IGNORED
            start = part.stop
        batch["position_ids"][line, start:] = torch.arange(longest - start)
    return batch


def keeps_rows_apart(causal_lm: Any, rows: Rows, compute: Compute) -> bool:
    """Whether rows in one sequence do not see each other, in this very model: the loss of a row does not change with what stands before it,
    and is what it is alone. Models with positions of their own (ALiBi), with recurrent states or with masks of their own do not."""
    if "position_ids" not in inspect.signature(causal_lm.base_model.forward).parameters:
        return False
    short = Rows(rows.table, min(TRIED_TOKENS, rows.limit or TRIED_TOKENS))
    before, row = sorted([short.ids(i) for i in range(min(len(rows), TRIED_ROWS))], key=len)[-2:] * (
        1 if len(rows) > 1 else 2
    )
    loss = LearnedTokenLoss(causal_lm)

    def nll(sequence: Sequence[list[int]]) -> torch.Tensor:
        """Of the last row's tokens."""
        ids = [token for row in sequence for token in row]
        positions = [position for row in sequence for position in range(len(row))]
        learned = [IGNORED] * (len(ids) - len(sequence[-1]) + 1) + list(sequence[-1][1:])
        made = {"input_ids": ids, "position_ids": positions, "labels": learned}
        return loss.per_token({k: torch.tensor([v], device=compute.device) for k, v in made.items()}).float()

    with inference(causal_lm), compute.autocast():
        packed, beside_another, alone = nll([before, row]), nll([before[::-1], row]), nll([row])
    return bool(
        torch.allclose(packed, beside_another, rtol=0, atol=SAME)
        and torch.allclose(packed, alone, rtol=LIKE, atol=LIKE)
    )
