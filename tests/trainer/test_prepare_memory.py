"""Files are read, and prepared rows written and read, in memory that does not grow with them."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finetune_trainer.prepare import near
from finetune_trainer.prepare.rows import read_rows
from finetune_trainer.prepare.split import held_out_rows
from finetune_trainer.prepare.store import SCHEMA, Index, Remembered, RowWriter, lists
from finetune_trainer.sources.data import DataFile

TEXT = "x" * 2000
ROWS = 6000


@contextmanager
def peak_below(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit, f"{peak / 1e6:.1f} MB"


def _lines(path: Path) -> None:
    with path.open("w") as file:
        file.writelines(json.dumps({"text": TEXT, "n": i}) + "\n" for i in range(ROWS))


def _array(path: Path) -> None:
    with path.open("w") as file:
        file.write("[")
        file.writelines(("," if i else "") + json.dumps({"text": TEXT, "n": i}) for i in range(ROWS))
        file.write("]")


def _csv(path: Path) -> None:
    with path.open("w") as file:
        file.write("text,n\n")
        file.writelines(f"{TEXT},{i}\n" for i in range(ROWS))


@pytest.mark.parametrize(("name", "write"), [("t.jsonl", _lines), ("t.json", _array), ("t.csv", _csv)])
def test_reading_twelve_megabytes_takes_less_than_two(tmp_path: Path, name: str, write: Callable[[Path], None]) -> None:
    write(tmp_path / name)
    with peak_below(2_000_000):
        assert sum(1 for row in read_rows(DataFile(tmp_path / name, name)) if row.problem is None) == ROWS


def test_reading_parquet_holds_a_page_not_the_row_group(tmp_path: Path) -> None:
    random = Random(0)
    texts = pa.array([random.randbytes(1000).hex() for _ in range(12_000)])
    table = pa.table({"text": texts, "unused": texts})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=len(texts), use_dictionary=False)
    assert pq.ParquetFile(tmp_path / "t.parquet").num_row_groups == 1
    before = pa.total_allocated_bytes()
    peak = 0
    for row in read_rows(DataFile(tmp_path / "t.parquet", "t.parquet"), {"text"}):
        assert row.problem is None
        peak = max(peak, pa.total_allocated_bytes() - before)
    assert (tmp_path / "t.parquet").stat().st_size > 20_000_000
    assert peak < 8_000_000, f"{peak / 1e6:.1f} MB"


def test_writing_48_megabytes_of_prepared_rows_holds_one_row_group(tmp_path: Path) -> None:
    ids = np.arange(1000, dtype=np.int32)
    write(tmp_path, ids, 1)  # pyarrow imports much of itself only now
    with peak_below(12_000_000):
        write(tmp_path, ids, 6000)


def write(folder: Path, ids: np.ndarray, rows: int) -> None:
    before = pa.total_allocated_bytes()
    columns = [pa.array([1]), pa.array(["f:1"]), lists([ids]), lists([ids]), pa.array([1], pa.int32())]
    row = pa.Table.from_arrays(columns, schema=SCHEMA)
    with RowWriter(folder / "f.parquet", SCHEMA) as writer:
        for _ in range(rows // 2):
            writer.write(row)
        writer.write(row, np.zeros(rows - rows // 2, np.int64))
        assert pa.total_allocated_bytes() - before < 60_000_000
    with pq.ParquetFile(folder / "f.parquet") as file:
        assert file.metadata.num_rows == rows
        assert {file.metadata.row_group(i).num_rows for i in range(file.num_row_groups - 1)} <= {1024}
        assert file.read_row_group(0)["labels"][-1].as_py() == ids.tolist()


@pytest.mark.parametrize("sketch_bytes", [0, near.SLOTS])
def test_of_a_row_21_bytes_are_remembered_and_64_for_near_duplicates(sketch_bytes: int) -> None:
    """An eighth more at most, by which Python's bytearrays grow ahead."""
    batch, batches = 512, 400
    rows = Remembered(
        groups=np.arange(batch, dtype=np.uint64),
        contents=np.arange(batch, dtype=np.uint64),
        lengths=np.full(batch, 3, np.uint32),
        sketches=np.zeros((batch if sketch_bytes else 0, near.SLOTS), np.uint8),
    )
    index = Index()
    with peak_below(round((21 + sketch_bytes) * 1.13 * batch * batches) + 100_000):
        for _ in range(batches):
            index.add(rows, from_held_out=False)
    assert len(index) == batch * batches == len(index.all.lengths)
    assert index.all.sketches.nbytes == sketch_bytes * len(index)


def test_rows_are_compared_and_split_in_55_bytes_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 here, in parts as small as those of a million are."""
    monkeypatch.setattr(near, "PART_ROWS", near.PART_ROWS // 10)
    rows = 100_000
    draw = np.random.default_rng(1)
    sketches = draw.integers(0, 256, (rows, near.SLOTS), np.uint8)
    groups = draw.integers(0, 1 << 63, rows, np.uint64)
    groups[1::50] = groups[::50]
    with peak_below(55 * rows):
        labels = near.clusters(sketches, groups, 0.8)
        held_out = held_out_rows(near.joined(groups, labels), 0.1, 1)
    assert 0.09 * rows < held_out.sum() <= 0.1 * rows
