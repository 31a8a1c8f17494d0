"""Which format a source's rows have, decided once per source from its first rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, islice

from finetune_api.failures import Reason
from finetune_api.spec import DataFormat, DataSource
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.examples import ALL_FIELDS, FIELDS
from finetune_trainer.prepare.rows import RawRow, read_rows
from finetune_trainer.prepare.template import Templates
from finetune_trainer.sources.data import DataFile
from finetune_trainer.text import is_utf8

LOOKED_AT = 100
Fields = Mapping[DataFormat, tuple[tuple[str, ...], tuple[str, ...]]]


def check_columns(source: DataSource, field: str) -> dict[str, str]:
    """The source's column mapping; for templates, where their rows have the fields.

    Raises:
        StageError: InvalidConfig for a field that no format has, or a template that is none.
    """
    if source.template is not None:
        return Templates(source.template, field).columns
    columns = dict(source.columns or {})
    unknown = sorted(set(columns) - set(ALL_FIELDS))
    if unknown:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{field}.columns: {', '.join(unknown)} is no field; expected some of {', '.join(ALL_FIELDS)}",
        )
    return columns


def detect(
    source: DataSource, field: str, columns: Mapping[str, str], first: Sequence[RawRow], fields: Fields = FIELDS
) -> DataFormat | None:
    """The declared format (a template declares it), or the first whose required columns one of the first rows has; None if no row could
    be read.

    Raises:
        StageError: InvalidData, if none of the readable first rows has the columns: then the columns are wrong, not the rows.
    """
    if source.template is not None:
        return source.template.format
    rows = [row for row in first if row.value is not None]
    candidates = list(fields) if source.format is DataFormat.AUTO else [source.format]
    if not rows:
        return None if source.format is DataFormat.AUTO else source.format
    for row in rows:
        assert row.value is not None
        for fmt in candidates:
            if all(columns.get(name, name) in row.value for name in fields[fmt][0]):
                return fmt
    assert rows[0].value is not None
    found = ", ".join(map(str, rows[0].value)) or "none"
    if not is_utf8(found):
        found += " (the header is not UTF-8: save the file as UTF-8)"
    if source.format is DataFormat.AUTO:
        wanted = " | ".join(" + ".join(required) for required, _ in fields.values())
    else:
        wanted = (
            " and ".join(columns.get(name, name) for name in fields[source.format][0]) + f" (format {source.format})"
        )
    raise StageError(
        Reason.INVALID_DATA,
        f"{rows[0].source} has wrong columns: expected {wanted}, found {found}. "
        f"Rename the columns, or map them with {field}.columns, for example {{prompt: question, completion: answer}}.",
    )


def with_format(
    source: DataSource,
    field: str,
    files: Sequence[DataFile],
    columns: Mapping[str, str],
    detected: Callable[[Sequence[RawRow]], DataFormat | None],
) -> Iterator[tuple[RawRow, DataFormat | None]]:
    """A source's rows, as its templates write them if it has some, each with the format that the first of them have; None before the first
    row that can be read.

    Args:
        detected: :func:`detect` for this source.
    """
    templates = Templates(source.template, field) if source.template is not None else None
    wanted = {columns.get(name, name) for name in ALL_FIELDS} if templates is None else templates.wanted
    read = chain.from_iterable(read_rows(file, wanted) for file in files)
    rows: Iterator[RawRow] = read if templates is None else map(templates.written, read)
    first = list(islice(rows, LOOKED_AT))
    fmt = detected(first)
    for raw in chain(first, rows):
        if fmt is None and raw.value is not None:
            fmt = detected([raw])
        yield raw, fmt
