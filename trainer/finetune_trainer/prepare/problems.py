"""Rows that cannot be used: counted, the first of them named by file, line and field."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
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


_QUOTED = re.compile(r', found |\(col |"')
NOT_SHOWN = "(what was found is not shown: data.checks.pii is Redact)"


def unquoted(text: str) -> str:
    """A problem without what it quotes of the data, for jobs that redact it: a shortened value cannot be searched for personal data."""
    quoted = _QUOTED.search(text)
    return text if quoted is None else f"{text[: quoted.start()].rstrip(' :')} {NOT_SHOWN}"


@contextmanager
def discreet(redact: bool) -> Iterator[None]:
    """Data that cannot be used at all is told of without quoting it, too."""
    try:
        yield
    except StageError as error:
        if not redact or error.reason is not Reason.INVALID_DATA:
            raise
        raise StageError(error.reason, unquoted(error.message)) from None


@dataclass
class Problems:
    """All unusable rows so far."""

    limit: int
    redact: bool = False
    """What is found in them is not told."""
    count: int = 0
    named: list[str] = field(default_factory=list)

    def add(self, source: str, text: str) -> None:
        """Row ``source`` ("file:line") cannot be used."""
        self.count += 1
        text = readable(unquoted(text) if self.redact else text)
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
