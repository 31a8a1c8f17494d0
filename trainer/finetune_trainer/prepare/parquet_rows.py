"""Rows of a Parquet file: only the columns that are used, a few pages in memory at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.json_stream import Unusable
from finetune_trainer.text import shorten

if TYPE_CHECKING:
    # What its module imports would take the start of the worker processes half a CPU second.
    from finetune_trainer.sources.data import DataFile

BATCH_ROWS = 64
BUFFER_BYTES = 1 << 20


def parquet_rows(file: DataFile, wanted: Collection[str]) -> Iterator[tuple[int, dict[str, Any] | Unusable]]:
    """``(number, row)``, numbers from 1. A row has all columns of the file; those that are not wanted are None and were not read.

    Memory is that of a page and a batch: pyarrow's defaults read a whole row group ahead, and many files have but one.

    Raises:
        StageError: InvalidData, if the file is damaged.
    """
    try:
        # A column of a type that Python cannot hold (nanoseconds) must not matter where nobody asks for it.
        with pq.ParquetFile(file.path, pre_buffer=False, buffer_size=BUFFER_BYTES) as parquet:
            names = parquet.schema_arrow.names
            used = [name for name in names if name in wanted] or names
            unread = dict.fromkeys(name for name in names if name not in used)
            number = 0
            for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=used, use_threads=False):
                for row in _values(batch):
                    number += 1
                    yield number, row if isinstance(row, Unusable) else {**row, **unread}
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno is not None):
            raise  # this machine's fault; of a damaged page pyarrow says OSError without a number
        raise StageError(
            Reason.INVALID_DATA,
            f"{file.name}: not a readable Parquet file, or a damaged one ({shorten(str(error), 200)}). Upload the file again.",
        ) from error


def _values(batch: pa.RecordBatch) -> list[dict[str, Any] | Unusable]:
    try:
        return list(batch.to_pylist())
    except ValueError:
        # Text that is not UTF-8, or a time that Python cannot hold: only the rows that have it are bad.
        return [_value(batch.slice(i, 1)) for i in range(batch.num_rows)]


def _value(row: pa.RecordBatch) -> dict[str, Any] | Unusable:
    try:
        return dict(row.to_pylist()[0])
    except ValueError as error:
        return Unusable(f"a value cannot be read ({shorten(str(error), 120)})")
