"""Rows that cannot be used: counted, the first of them named by file, line and field."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.text import plural, readable, shorten

log = logging.getLogger(__name__)

LOGGED = 20
NAMED_IN_MESSAGE = 5
MESSAGE_CHARACTERS = 1000
FOUND_CHARACTERS = 60


class RowProblem(Exception):
    """Why one row cannot be used: ``field: expected …, found …``."""

    def __init__(self, text: str) -> None:
        self.text = readable(text)
        super().__init__(self.text)


def expected(where: str, what: str, found: object) -> RowProblem:
    """A problem with the value at ``where``."""
    return RowProblem(f"{where}: expected {what}, found {describe(found)}")


def describe(value: object) -> str:
    """A value as it looks in the data file, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        if not value.strip():
            return "empty text"
        return f'"{shorten(value, FOUND_CHARACTERS)}"'
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, list):
        return "an empty list" if not value else f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(list(map(str, value))[:5])}" if value else "an empty object"
    return type(value).__name__


@dataclass
class Problems:
    """All unusable rows so far."""

    limit: int
    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, source: str, text: str) -> None:
        """Row ``source`` ("file:line") cannot be used."""
        self.count += 1
        text = readable(text)
        if len(self.named) < LOGGED:
            self.named.append(f"{source} {text}")
            log.warning("%s %s", source, text)
        elif self.count == LOGGED + 1:
            log.warning("… further unusable rows are counted, not listed")

    @property
    def too_many(self) -> bool:
        """Whether the job must fail."""
        return self.count > self.limit

    def check(self, rows: int) -> None:
        """Called when all rows were read.

        Raises:
            StageError: InvalidData, if more rows than data.checks.maxBadRows cannot be used.
        """
        if not self.too_many:
            return
        head = f"{self.count:,} of {plural(rows, 'row')} cannot be used (limit {self.limit:,}). "
        named: list[str] = []
        for text in self.named[:NAMED_IN_MESSAGE]:
            named.append(shorten(text, 200))
            if len(head) + sum(map(len, named)) > MESSAGE_CHARACTERS:
                break
        more = self.count - len(named)
        tail = f"; and {more:,} more, the first {LOGGED} in the log." if more else "."
        raise StageError(Reason.INVALID_DATA, head + "; ".join(named) + tail)
