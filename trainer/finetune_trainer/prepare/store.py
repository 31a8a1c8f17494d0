"""Prepared rows in Parquet files, written and read as streams."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.results import PREPARED_VERSION
from finetune_trainer.prepare.encode import Encoded, Ids

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


class RowWriter:
    """Writes rows; memory holds at most one row group."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A dictionary of token ids makes the file larger by a sixth, and writing it takes twice as long.
        self._writer = pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False)
        self._schema = schema
        self._rows: list[dict[str, object]] = []
        self._tokens = 0

    def write(self, row: dict[str, object], tokens: int) -> None:
        """Add a row that has ``tokens`` tokens."""
        self._rows.append(row)
        self._tokens += tokens
        if len(self._rows) >= ROW_GROUP_ROWS or self._tokens >= ROW_GROUP_TOKENS:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [_column([row[f.name] for row in self._rows], f.type) for f in self._schema]
            self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
            self._rows, self._tokens = [], 0

    def __enter__(self) -> RowWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self._flush()
        self._writer.close()


def _column(values: list[Any], kind: pa.DataType) -> pa.Array:
    """An Arrow column. Lists of ids come as arrays, which Arrow would copy number by number."""
    if not pa.types.is_list(kind):
        return pa.array(values, kind)
    offsets = np.cumsum([0, *(len(v) for v in values)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(values).astype(np.int32, copy=False)))


def read_spool(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file, one row group in memory; lists of ids as int32 arrays."""
    with pq.ParquetFile(path) as file:
        for number in range(file.num_row_groups):
            table = file.read_row_group(number)
            columns = [_values(table.column(name)) for name in table.column_names]
            for values in zip(*columns, strict=True):
                yield dict(zip(table.column_names, values, strict=True))


def _values(column: pa.ChunkedArray) -> list[Any]:
    if not pa.types.is_list(column.type):
        return list(column.to_pylist())
    lists = column.combine_chunks()
    values = lists.values.to_numpy()
    return [values[start:end] for start, end in pairwise(lists.offsets.to_pylist())]


@dataclass
class Side:
    """Counts of one side of the split."""

    rows: int = 0
    tokens: int = 0
    targets: int = 0

    def add(self, encoded: Encoded) -> None:
        """One more row."""
        self.rows += 1
        self.tokens += len(encoded.ids)
        self.targets += encoded.targets


class DataHash:
    """SHA-256 over the digests of the train and the held-out rows. A side's digest is over its rows: row number and length as
    int64, ids and labels as int32, little endian. It does not depend on Parquet's bytes or on where the sources were."""

    def __init__(self) -> None:
        self._sides = (hashlib.sha256(), hashlib.sha256())

    def add(self, held_out: bool, row: int, ids: Ids, labels: Ids) -> None:
        """The next row of a side, in order."""
        side = self._sides[held_out]
        side.update(np.array([row, len(ids)], "<i8").tobytes())
        side.update(ids.astype("<i4").tobytes())
        side.update(labels.astype("<i4").tobytes())

    def hexdigest(self) -> str:
        """The hash."""
        return hashlib.sha256(b"".join(side.digest() for side in self._sides)).hexdigest()


@dataclass
class Index:
    """What is remembered of every usable row: 25 bytes each, and 64 where near duplicates are looked for, whatever its length."""

    groups: array[int]
    contents: array[int]
    lengths: array[int]
    from_held_out: array[int]
    sketches: bytearray

    @classmethod
    def empty(cls) -> Index:
        """No rows."""
        return cls(array("Q"), array("Q"), array("L"), array("b"), bytearray())

    def add(self, group: int, content: int, length: int, held_out: bool) -> None:
        """One more row."""
        self.groups.append(group)
        self.contents.append(content)
        self.lengths.append(length)
        self.from_held_out.append(held_out)
