"""Rows of json, jsonl, csv and parquet files (also compressed), read as a stream: memory does not grow with the file."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.compressed import LONGEST, SUFFIXES, blaming_the_file, compression, opened
from finetune_trainer.prepare.json_stream import BrokenJson, Unusable, json_values
from finetune_trainer.prepare.parquet_rows import parquet_rows
from finetune_trainer.prepare.problems import describe
from finetune_trainer.text import shorten

if TYPE_CHECKING:
    # What its module imports would take the start of the worker processes half a CPU second.
    from finetune_trainer.sources.data import DataFile

MAX_ROW_BYTES = 64 << 20
DELIMITERS = ",;\t|"


@dataclass(frozen=True)
class RawRow:
    """One row, or why it is none. ``source`` is "file:line" (for Parquet: "file:row", from 1)."""

    source: str
    value: dict[str, Any] | None
    problem: str | None = None


def read_rows(file: DataFile, wanted: Collection[str] = ()) -> Iterator[RawRow]:
    """All rows of a file, in order.

    Args:
        wanted: columns that may be used. Of a Parquet file only those are read (all, if it has none of them); the others are None.

    Raises:
        StageError: InvalidData, where the rest of the file cannot be read at all.
    """
    with file.path.open("rb") as raw:
        head = raw.read(LONGEST)
    packed = compression(head)
    with blaming_the_file(file.name, packed):
        yield from _reader(file, wanted, head, packed)


def _reader(file: DataFile, wanted: Collection[str], head: bytes, packed: str | None) -> Iterator[RawRow]:
    stem, _, kind = file.name.lower().rpartition(".")
    if kind in SUFFIXES:
        kind = stem.rpartition(".")[2]
    if head[:4] == b"PAR1" or kind == "parquet":
        if packed:
            raise StageError(
                Reason.INVALID_DATA,
                f"{file.name}: Parquet inside {packed}; Parquet is compressed already: upload it as it is",
            )
        for number, value in parquet_rows(file, wanted):
            yield _checked(f"{file.name}:{number}", value)
        return
    with opened(file.path, packed) as stream:
        start = _peek(stream)
    if kind not in ("jsonl", "ndjson", "json", "csv"):
        kind = "json" if start[:1] in (b"[", b"{") else "unknown"
    with opened(file.path, packed) as stream:
        if kind == "csv":
            yield from _csv(file.name, stream)
        elif kind in ("jsonl", "ndjson"):
            yield from _json_lines(file.name, stream)
        elif kind == "json":
            yield from _json(file.name, stream, start)
        else:
            found = shorten(start[:60].decode("utf-8", "replace"), 60)
            raise StageError(
                Reason.INVALID_DATA,
                f"{file.name}: expected JSON lines, a JSON array, CSV or Parquet, found {found!r} at the start",
            )


def _peek(stream: IO[bytes]) -> bytes:
    """The first line that is not blank, without white space and byte order mark, shortened."""
    start = stream.read(1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.split(b"\n", 1)[0].strip()


def _json(name: str, stream: IO[bytes], start: bytes) -> Iterator[RawRow]:
    """An array of rows; or, under the same ending, JSON lines."""
    if start[:1] == b"{":
        try:
            json.loads(start)
        except ValueError:
            pass
        else:
            yield from _json_lines(name, stream)
            return
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    try:
        for line, value in json_values(text, MAX_ROW_BYTES):
            yield _checked(f"{name}:{line}", value)
    except BrokenJson as error:
        raise StageError(
            Reason.INVALID_DATA,
            f"{name}:{error.line} not JSON (col {error.column}: {shorten(error.found, 40)!r}); the rest of the file cannot be read. "
            "Mend the file, or write one JSON object per line (.jsonl): then every row is judged alone.",
        ) from error


def _json_lines(name: str, stream: IO[bytes]) -> Iterator[RawRow]:
    number = 0
    while line := stream.readline(MAX_ROW_BYTES):
        number += 1
        source = f"{name}:{number}"
        if len(line) == MAX_ROW_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield RawRow(source, None, f"longer than {MAX_ROW_BYTES >> 20} MiB")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as error:
            yield RawRow(source, None, f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})")
            continue
        try:
            value = json.loads(text)
        except json.JSONDecodeError as error:
            found = shorten(text[error.pos :].strip(), 30)
            yield RawRow(
                source,
                None,
                f"not JSON (col {error.colno}: {found!r})" if found else f"not JSON (col {error.colno}: the line ends)",
            )
        except (RecursionError, ValueError) as error:
            yield RawRow(source, None, f"not usable JSON ({type(error).__name__})")
        else:
            yield _checked(source, value)


def _csv(name: str, stream: IO[bytes]) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_ROW_BYTES)
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    first = text.readline(1 << 20)
    delimiter = max(DELIMITERS, key=lambda d: (first.count(d), -DELIMITERS.index(d)))
    reader = csv.reader(_chain(first, text), delimiter=delimiter)
    header = [column.strip() for column in next(reader, [])]
    if len(set(header)) != len(header):
        twice = sorted({c for c in header if header.count(c) > 1})
        raise StageError(Reason.INVALID_DATA, f"{name}:1 the header names {', '.join(map(repr, twice))} more than once")
    while True:
        line = reader.line_num + 1
        source = f"{name}:{line}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRow(source, None, f"not CSV ({error})")
            continue
        if not fields:
            continue
        if len(fields) != len(header):
            yield RawRow(source, None, f"expected {len(header)} fields as in the header, found {len(fields)}")
            continue
        yield _checked(source, dict(zip(header, fields, strict=True)))


def _chain(first: str, rest: IO[str]) -> Iterator[str]:
    yield first
    yield from rest


def _checked(source: str, value: object) -> RawRow:
    if isinstance(value, Unusable):
        return RawRow(source, None, value.problem)
    if not isinstance(value, dict):
        return RawRow(source, None, f"expected an object, found {describe(value)}")
    return RawRow(source, value)
