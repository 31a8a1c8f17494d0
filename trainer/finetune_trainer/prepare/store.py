"""Prepared rows in Parquet files, written as streams, and what is remembered of their rows."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.results import IGNORED, PREPARED_VERSION
from finetune_trainer.prepare.near import SLOTS
from finetune_trainer.prepare.tokens import Ids

ROW_GROUP_ROWS = 1024
ROW_GROUP_TOKENS = 1 << 20
FIELDS = [
    ("row", pa.int64()),
    ("source", pa.string()),
    ("input_ids", pa.list_(pa.int32())),
    ("labels", pa.list_(pa.int32())),
    ("prompt_tokens", pa.int32()),
]
SCHEMA = pa.schema(FIELDS, metadata={"finetune.prepared_version": str(PREPARED_VERSION)})
# context: JSON of the turns before the answer and of the tools, where the row has turns. copies: how often it is trained on in an epoch.
SPOOL_SCHEMA = pa.schema(
    [*FIELDS, ("prompt", pa.string()), ("reference", pa.string()), ("context", pa.string()), ("copies", pa.int32())]
)
HEAD = struct.Struct("<qq")
_NO_IDS = np.zeros(0, np.int32)
Numbers = npt.NDArray[np.int64]


class RowWriter:
    """Writes rows; memory holds at most one row group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A dictionary of token ids makes the file larger by a sixth, and writing it takes twice as long.
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False)
        self._schema = schema
        self._parts: list[pa.Table] = []
        self._rows = 0
        self._tokens = 0

    def write(self, rows: pa.Table, chosen: Numbers | None = None) -> None:
        """Add rows.

        Args:
            chosen: which of them, in this order; all, if it is left out.
        """
        rows = rows.cast(self._schema)
        lengths = np.diff(flat(rows.column("input_ids"))[1])
        lengths = lengths if chosen is None else lengths[chosen]
        begin = 0
        while begin < len(lengths):
            tokens = self._tokens + np.cumsum(lengths[begin : begin + ROW_GROUP_ROWS - self._rows])
            count = min(int(np.searchsorted(tokens, ROW_GROUP_TOKENS)) + 1, len(tokens))
            # Only a part at a time is copied: a row may be chosen many times.
            part = rows.slice(begin, count) if chosen is None else rows.take(chosen[begin : begin + count])
            self._parts.append(part)
            self._rows, self._tokens = self._rows + count, int(tokens[count - 1])
            if self._rows >= ROW_GROUP_ROWS or self._tokens >= ROW_GROUP_TOKENS:
                self._flush()
            begin += count

    def _flush(self) -> None:
        if self._rows:
            self._writer.write_table(pa.concat_tables(self._parts).combine_chunks())
            self._parts, self._rows, self._tokens = [], 0, 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def lists(rows: Sequence[Ids]) -> pa.ListArray:
    """Rows of ids as an Arrow column; given the arrays themselves, Arrow would copy number by number."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([_NO_IDS, *rows])))


def flat(column: pa.ListArray | pa.ChunkedArray) -> tuple[Ids, Numbers]:
    """All ids of a column, and where each row begins in them, with the end of the last one."""
    rows = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return rows.values.to_numpy(), rows.offsets.to_numpy().astype(np.int64)


@dataclass
class Side:
    """One side of the split: counts, and the SHA-256 over its rows: row number and length as int64, ids and labels as int32, little
    endian. It does not depend on Parquet's bytes or on where the sources were."""

    rows: int = 0
    tokens: int = 0
    targets: int = 0
    digest: Any = field(default_factory=hashlib.sha256)

    def add(self, rows: pa.Table, chosen: Numbers) -> None:
        """More rows, in order.

        Args:
            chosen: which rows of the table; one may stand there several times.
        """
        ids, bounds = flat(rows.column("input_ids"))
        labels, _ = flat(rows.column("labels"))
        learned = labels != IGNORED
        # The first token is predicted from nothing, so its label never counts.
        learned[bounds[:-1]] = False
        before = np.concatenate([[0], np.cumsum(learned)])
        self.rows += len(chosen)
        self.tokens += int(np.diff(bounds)[chosen].sum())
        self.targets += int(np.diff(before[bounds])[chosen].sum())
        numbers = rows.column("row").to_numpy()[chosen].tolist()
        for number, begin, end in zip(numbers, bounds[chosen].tolist(), bounds[chosen + 1].tolist(), strict=True):
            self.digest.update(HEAD.pack(number, end - begin))
            self.digest.update(ids[begin:end])
            self.digest.update(labels[begin:end])


def data_hash(sides: Sequence[Side]) -> str:
    """SHA-256 over the digests of the train and the held-out rows."""
    return hashlib.sha256(b"".join(side.digest.digest() for side in sides)).hexdigest()


@dataclass(frozen=True)
class Remembered:
    """What is remembered of some usable rows."""

    groups: npt.NDArray[np.uint64]
    """Of what must not stand on both sides of the split."""
    contents: npt.NDArray[np.uint64]
    """Of all tokens."""
    lengths: npt.NDArray[np.uint32]
    """Before truncation."""
    sketches: npt.NDArray[np.uint8]
    """(rows, 64), for near duplicates; no rows where they are not looked for."""


@dataclass
class Index:
    """What is remembered of every usable row: 21 bytes each, and 64 where near duplicates are looked for, whatever its length."""

    _groups: bytearray = field(default_factory=bytearray)
    _contents: bytearray = field(default_factory=bytearray)
    _lengths: bytearray = field(default_factory=bytearray)
    _from_held_out: bytearray = field(default_factory=bytearray)
    _sketches: bytearray = field(default_factory=bytearray)

    def add(self, rows: Remembered, from_held_out: bool) -> None:
        """More rows."""
        self._groups += rows.groups.tobytes()
        self._contents += rows.contents.tobytes()
        self._lengths += rows.lengths.tobytes()
        self._from_held_out += bytes([from_held_out]) * len(rows.groups)
        self._sketches += rows.sketches.tobytes()

    def __len__(self) -> int:
        return len(self._from_held_out)

    @property
    def from_held_out(self) -> npt.NDArray[np.bool_]:
        """Whether a row's source is for evaluation only."""
        return np.frombuffer(self._from_held_out, bool)

    @property
    def all(self) -> Remembered:
        """Of all rows, without a copy: none can be added any more while it is held."""
        return Remembered(
            groups=np.frombuffer(self._groups, np.uint64),
            contents=np.frombuffer(self._contents, np.uint64),
            lengths=np.frombuffer(self._lengths, np.uint32),
            sketches=np.frombuffer(self._sketches, np.uint8).reshape(-1, SLOTS),
        )
