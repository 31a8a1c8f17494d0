"""Prepared rows: token ids and labels as the prepare stage left them, and how rows become a batch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from finetune_api.results import IGNORED, PREPARED_VERSION
from finetune_trainer.stored import refuse_newer

Batch = dict[str, torch.Tensor]
"""``input_ids``, ``attention_mask``, ``labels``: int64, shape (rows, longest row); packed, ``position_ids`` instead of the mask."""


@dataclass(frozen=True)
class Rows:
    """Rows of a prepared Parquet file, in memory as Arrow columns (8 bytes a token). Of longer ones the first ``limit`` tokens."""

    table: pa.Table
    limit: int | None = None

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def ids(self, index: int) -> list[int]:
        """Token ids of a row."""
        return list(self.table["input_ids"][index].as_py()[: self.limit])

    def labels(self, index: int) -> list[int]:
        """Labels of a row, aligned with its ids."""
        return list(self.table["labels"][index].as_py()[: self.limit])

    def length(self, index: int) -> int:
        """Tokens of a row."""
        length = len(self.table["input_ids"][index])
        return length if self.limit is None else min(length, self.limit)

    def longest(self) -> int:
        """Tokens of the longest row."""
        longest = int(pc.max(pc.list_value_length(self.table["input_ids"])).as_py())
        return longest if self.limit is None else min(longest, self.limit)

    def learned_tokens(self, index: int) -> int:
        """Tokens of a row that are predicted and learned. The first token of a row is never predicted."""
        return sum(label != IGNORED for label in self.labels(index)[1:])


def read_rows(path: Path) -> Rows:
    """Read a prepared Parquet file.

    Raises:
        StageError: InvalidConfig, if a newer image wrote it.
    """
    table = pq.read_table(path, columns=["input_ids", "labels"])
    version = int((table.schema.metadata or {}).get(b"finetune.prepared_version", b"0"))
    refuse_newer(path.name, version, PREPARED_VERSION)
    return Rows(table.combine_chunks())


def collate(rows: Rows, indices: list[int], pad_id: int) -> Batch:
    """Pad to the longest of these rows, on the right. Padding is never attended to and never learned.

    Without rows (a rank whose share of a ragged step is empty) it is two tokens of which nothing is learned.

    The mask follows the rows' lengths, not ``pad_id``: many models' padding token is their end-of-turn token, which is learned.
    """
    if not indices:
        nothing = {"input_ids": torch.full((1, 2), pad_id), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
        return {**nothing, "labels": torch.full((1, 2), IGNORED)}
    longest = max(rows.length(i) for i in indices)
    shape = (len(indices), longest)
    batch = {
        "input_ids": torch.full(shape, pad_id, dtype=torch.long),
        "attention_mask": torch.zeros(shape, dtype=torch.long),
        "labels": torch.full(shape, IGNORED, dtype=torch.long),
    }
    for line, index in enumerate(indices):
        ids = torch.tensor(rows.ids(index))
        batch["input_ids"][line, : len(ids)] = ids
        batch["attention_mask"][line, : len(ids)] = 1
        batch["labels"][line, : len(ids)] = torch.tensor(rows.labels(index))
    return batch


def batches_by_length(rows: Rows, token_budget: int) -> list[list[int]]:
    """All rows, longest first, in batches of at most ``token_budget`` tokens with padding (at least one row each).

    For evaluation only, where order does not matter: rows of like length waste no padding.
    """
    order = sorted(range(len(rows)), key=lambda i: (-rows.length(i), i))
    batches: list[list[int]] = []
    for index in order:
        # The first row of a batch is its longest.
        if batches and rows.length(batches[-1][0]) * (len(batches[-1]) + 1) <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
