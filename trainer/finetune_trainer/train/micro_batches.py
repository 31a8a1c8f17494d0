"""How a step's rows are cut into micro-batches and shared out over ranks. Which rows a step has is the schedule's."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from finetune_api.results import IGNORED
from finetune_trainer.train.packing import Sequences, collate_packed, pack
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.rows import Batch, Rows, collate
from finetune_trainer.train.schedule import Schedule


class MicroBatches(Sampler[Any]):
    """This rank's rows of each micro-batch from a step on. Every step but the last has the same number of them, on every rank.

    The longest rows of a step come first, so that rows of like length share a micro-batch and ranks have like work; a gradient is a sum and
    does not tell.
    """

    def __init__(self, schedule: Schedule, rows: Rows, micro_batch: int, start_step: int, ranks: Ranks) -> None:
        self.schedule, self.rows, self.ranks = schedule, rows, ranks
        self.micro_batch, self.start_step = micro_batch, start_step

    @property
    def together(self) -> int:
        """Sequences of a micro-batch, over all ranks."""
        return self.micro_batch * self.ranks.size

    def __len__(self) -> int:
        full = self.schedule.steps - 1 - self.start_step
        last = len(self.schedule.step_rows(self.schedule.steps - 1))
        return full * math.ceil(self.schedule.global_batch / self.together) + math.ceil(last / self.together)

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.start_step, self.schedule.steps):
            yield from self.cut(sorted(self.schedule.step_rows(step), key=lambda i: -self.rows.length(i)))

    def cut(self, ids: list[int]) -> Iterator[Any]:
        """Of one step."""
        own = slice(self.ranks.rank * self.micro_batch, (self.ranks.rank + 1) * self.micro_batch)
        return (ids[start : start + self.together][own] for start in range(0, len(ids), self.together))

    def collate(self, indices: Any, pad_id: int) -> Batch:
        """As a batch."""
        return collate(self.rows, indices, pad_id)


class AsDrawn(Dataset[Any]):
    """What a DataLoader reads: what the sampler has drawn, as it is."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitems__(self, drawn: Any) -> Any:
        """One micro-batch."""
        return drawn


class PackedMicroBatches(MicroBatches):
    """Rows packed into sequences as long as the longest row at most, so that a step needs fewer micro-batches; for those that are left over
    nothing is computed."""

    def __init__(self, schedule: Schedule, rows: Rows, micro_batch: int, start_step: int, ranks: Ranks) -> None:
        super().__init__(schedule, rows, micro_batch, start_step, ranks)
        self.capacity = rows.longest()

    def cut(self, ids: list[int]) -> Iterator[Sequences | None]:
        """Of one step; None for what is left over."""
        packed = pack(ids, [self.rows.length(i) for i in ids], self.capacity, self.together)
        for sequences in packed:
            yield [sequence for sequence in sequences[self.ranks.rank :: self.ranks.size] if sequence]
        yield from [None] * (math.ceil(len(ids) / self.together) - len(packed))

    def collate(self, indices: Sequences | None, pad_id: int) -> Batch:
        """As a batch, of no tokens for what is left over."""
        if indices is None:
            nothing = torch.empty(1, 0, dtype=torch.long)
            return {"input_ids": nothing, "labels": torch.full_like(nothing, IGNORED)}
        return collate_packed(self.rows, indices, pad_id)
