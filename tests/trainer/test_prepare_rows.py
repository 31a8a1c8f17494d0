"""Reading rows: every kind of file, every kind of damage, each named by file and line."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.prepare import json_stream
from finetune_trainer.prepare.json_stream import json_values
from finetune_trainer.prepare.rows import RawRow, read_rows
from finetune_trainer.sources.data import DataFile


def rows_of(tmp_path: Path, name: str, data: bytes | str) -> list[RawRow]:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_rows(DataFile(path, name)))


def values(rows: list[RawRow]) -> list[tuple[str, Any]]:
    return [(row.source, row.value if row.problem is None else row.problem) for row in rows]


def parquet_bytes(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


A, B = {"text": "é"}, {"text": "b\nc"}
CSV = 'text,n\né,1\n"b\nc",2\n'


@pytest.mark.parametrize(
    ("name", "data", "sources"),
    [
        ("t.jsonl", json.dumps(A) + "\n\n" + json.dumps(B), ["t.jsonl:1", "t.jsonl:3"]),
        ("t.jsonl", "\ufeff" + json.dumps(A) + "\r\n" + json.dumps(B) + "\r\n", ["t.jsonl:1", "t.jsonl:2"]),
        ("t.json", json.dumps([A, B]), ["t.json:1", "t.json:1"]),
        ("t.json", json.dumps([A, B], indent=2), ["t.json:2", "t.json:5"]),
        ("t.json", json.dumps(A) + "\n" + json.dumps(B), ["t.json:1", "t.json:2"]),
        ("t.json", json.dumps(A, indent=1) + "\n" + json.dumps(B, indent=1), ["t.json:1", "t.json:4"]),
        ("t.jsonl.gz", gzip.compress((json.dumps(A) + "\n" + json.dumps(B)).encode(), mtime=0), ["t.jsonl.gz:1", "t.jsonl.gz:2"]),
        ("t.jsonl.bz2", bz2.compress((json.dumps(A) + "\n" + json.dumps(B)).encode()), ["t.jsonl.bz2:1", "t.jsonl.bz2:2"]),
        ("t.json.xz", lzma.compress(json.dumps([A, B]).encode()), ["t.json.xz:1", "t.json.xz:1"]),
        ("t.jsonl.zst", zstd((json.dumps(A) + "\n" + json.dumps(B)).encode()), ["t.jsonl.zst:1", "t.jsonl.zst:2"]),
        ("t.parquet", parquet_bytes([A, B]), ["t.parquet:1", "t.parquet:2"]),
        ("download", json.dumps([A, B]), ["download:1", "download:1"]),
    ],
    ids=["jsonl with a blank line", "jsonl with BOM and CRLF", "json", "json indented", "jsonl named json", "objects named json",
         "jsonl.gz", "jsonl.bz2", "json.xz", "jsonl.zst", "parquet", "json without an ending"],
)  # fmt: skip
def test_every_kind_of_file_gives_the_same_rows(
    tmp_path: Path, name: str, data: bytes | str, sources: list[str]
) -> None:
    assert values(rows_of(tmp_path, name, data)) == list(zip(sources, [A, B], strict=True))


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_csv_of_every_delimiter_gives_rows_with_their_first_line(tmp_path: Path, delimiter: str) -> None:
    rows = rows_of(tmp_path, "t.csv", "\ufeff" + CSV.replace(",", delimiter))
    assert values(rows) == [("t.csv:2", {"text": "é", "n": "1"}), ("t.csv:3", {"text": "b\nc", "n": "2"})]


@pytest.mark.parametrize(
    ("name", "data", "problems"),
    [
        ("t.jsonl", '{"a":1}\n<html>\n{"a":2}', {"t.jsonl:2": "not JSON (col 1: '<html>')"}),
        ("t.jsonl", '{"a": 1,}', {"t.jsonl:1": "not JSON (col"}),
        ("t.jsonl", '{"a": 1', {"t.jsonl:1": "the line ends"}),
        ("t.jsonl", b'{"a": "\xff"}', {"t.jsonl:1": "not UTF-8 (byte 0xff at position 8)"}),
        ("t.jsonl", "[1]\n3\nnull", {"t.jsonl:1": "expected an object, found a list of 1", "t.jsonl:2": "found the number 3",
                                     "t.jsonl:3": "found null"}),
        ("t.jsonl", "[" * 100_000, {"t.jsonl:1": "not usable JSON"}),
        ("t.csv", "a,b\n1,2\n1,2,3\n1\n", {"t.csv:3": "expected 2 fields as in the header, found 3", "t.csv:4": "found 1"}),
        ("t.json", '[{"a":1}, 5]', {"t.json:1": "expected an object, found the number 5"}),
    ],
    ids=["no JSON", "comma too many", "cut line", "wrong bytes", "no objects", "too deep", "csv fields", "array of numbers"],
)  # fmt: skip
def test_a_broken_row_is_named_and_the_next_is_read(
    tmp_path: Path, name: str, data: bytes | str, problems: dict[str, str]
) -> None:
    found = {row.source: row.problem for row in rows_of(tmp_path, name, data) if row.problem}
    assert found.keys() == problems.keys()
    for source, text in problems.items():
        assert text in (found[source] or "")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("t.json", '[{"a": 1},\n {"a": 2},\n {"a" 3}]', r"t\.json:3 not JSON \(col 7: '3"),
        ("t.json", '[{"a": 1}', "not JSON .*the file ends"),
        ("t.json", '[{"a": 1}] x', "not JSON .*'x'"),
        ("t.csv", "a,b,a\n", "names 'a' more than once"),
        ("t.parquet", b"PAR1 and then nothing", "not a readable Parquet file"),
        (
            "t.parquet.gz",
            gzip.compress(b"PAR1", mtime=0),
            "Parquet inside gzip; Parquet is compressed already: upload it as it is",
        ),
        ("t.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000, mtime=0)[:-20], "gzip stream is damaged"),
        ("t.jsonl.bz2", bz2.compress(b'{"a": 1}\n' * 1000)[:-20], "bz2 stream is damaged"),
        ("t.jsonl.xz", lzma.compress(b'{"a": 1}\n' * 1000)[:-20], "xz stream is damaged"),
        ("t.jsonl.zst", zstd(b'{"a": 1}\n' * 1000)[:-20], "zstd stream is damaged"),
        ("page", "<!DOCTYPE html>", "expected JSON lines.*DOCTYPE"),
    ],
)
def test_a_file_that_cannot_be_read_on_fails_with_its_name(
    tmp_path: Path, name: str, data: bytes | str, message: str
) -> None:
    with pytest.raises(StageError, match=message) as info:
        rows_of(tmp_path, name, data)
    assert info.value.reason is Reason.INVALID_DATA
    assert name in info.value.message


HUGE = "1" * 5000


@pytest.mark.parametrize(
    ("name", "data", "problem"),
    [
        ("t.json", f'[{{"a": 1}}, {{"a": {HUGE}}}, {{"a": 2}}]', "holds an integer of 5,000 digits"),
        ("t.json", f'[{{"a": 1}}, [-{HUGE}], {{"a": 2}}]', "holds an integer of 5,001 digits"),
        ("t.jsonl", f'{{"a": 1}}\n{{"a": {HUGE}}}\n{{"a": 2}}', "not usable JSON"),
    ],
)
def test_an_integer_that_python_does_not_convert_is_one_bad_row(
    tmp_path: Path, name: str, data: str, problem: str
) -> None:
    rows = rows_of(tmp_path, name, data)
    assert [row.value for row in rows] == [{"a": 1}, None, {"a": 2}]
    assert problem in (rows[1].problem or "")


def parquet_file(tmp_path: Path, columns: dict[str, pa.Array], **options: Any) -> DataFile:
    pq.write_table(pa.table(columns), tmp_path / "t.parquet", **options)
    return DataFile(tmp_path / "t.parquet", "t.parquet")


def test_columns_that_nobody_uses_are_named_and_not_read(tmp_path: Path) -> None:
    times = pa.array([1, 2_000_000_001], pa.timestamp("ns"))  # without pandas no Python value
    turns = pa.array([[{"role": "user", "content": "q"}], []])
    file = parquet_file(tmp_path, {"when": times, "messages": turns, "text": pa.array(["a", "b"])})
    rows = list(read_rows(file, {"messages", "text"}))
    assert [row.value for row in rows] == [
        {"messages": [{"role": "user", "content": "q"}], "text": "a", "when": None},
        {"messages": [], "text": "b", "when": None},
    ]


def test_parquet_text_that_is_not_utf8_is_one_bad_row(tmp_path: Path) -> None:
    text = pa.array([b"a", b"\xff", b"c"], pa.binary()).view(pa.string())
    rows = list(read_rows(parquet_file(tmp_path, {"text": text}), {"text"}))
    assert [row.value for row in rows] == [{"text": "a"}, None, {"text": "c"}]
    assert "utf-8" in (rows[1].problem or "")


@pytest.mark.parametrize("compression", ["snappy", "gzip", "zstd"])
def test_a_damaged_page_is_damaged_data_and_names_the_file(tmp_path: Path, compression: str) -> None:
    texts = [f"{i} " + "word " * (i % 50) for i in range(2000)]
    file = parquet_file(tmp_path, {"text": pa.array(texts)}, compression=compression, use_dictionary=False)
    data = bytearray(file.path.read_bytes())
    middle = len(data) // 3
    data[middle : middle + 200] = bytes(200)
    file.path.write_bytes(data)
    with pytest.raises(StageError, match=r"t\.parquet: not a readable Parquet file, or a damaged one") as info:
        list(read_rows(file, {"text"}))
    assert info.value.reason is Reason.INVALID_DATA


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(JSON, max_size=5), st.integers(1, 7), st.sampled_from([None, 1]), st.booleans())
def test_json_values_do_not_depend_on_how_the_file_is_cut(
    rows: list[Any], chunk: int, indent: int | None, array: bool
) -> None:
    text = json.dumps(rows, indent=indent) if array else "\n".join(json.dumps(r, indent=indent) for r in [{}, *rows])
    wanted = rows if array else [{}, *rows]
    original = json_stream.CHUNK_CHARACTERS
    json_stream.CHUNK_CHARACTERS = chunk
    try:
        read = list(json_values(io.StringIO(text), 1 << 20))
    finally:
        json_stream.CHUNK_CHARACTERS = original
    assert [value for _, value in read] == wanted
    lines = text.splitlines() or [""]
    assert all(1 <= line <= len(lines) for line, _ in read)
