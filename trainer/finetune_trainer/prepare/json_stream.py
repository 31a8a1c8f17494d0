"""JSON values from a text stream, one at a time, in memory bounded by the longest value."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

CHUNK_CHARACTERS = 1 << 16
_NUMBER_GOES_ON = ("", *".eE+-0123456789")
_SPACE = re.compile(r"[ \t\r\n]*")


class BrokenJson(Exception):
    """The stream is not JSON at ``line`` and ``column`` (from 1)."""

    def __init__(self, line: int, column: int, found: str) -> None:
        super().__init__(f"{line}:{column}")
        self.line = line
        self.column = column
        self.found = found


@dataclass(frozen=True)
class Unusable:
    """Stands for a value that is JSON and cannot be held."""

    problem: str


def json_values(stream: IO[str], max_characters: int) -> Iterator[tuple[int, Any]]:
    """``(line, value)`` of every element of an array, or of every value of a sequence of values; Unusable for one that holds an
    integer beyond what Python converts (4,300 digits).

    Raises:
        BrokenJson: at the first place that is not JSON, or where one value is longer than ``max_characters``.
    """
    buffer = _Buffer(stream)
    in_array = buffer.peek() == "["
    if in_array:
        buffer.take(1)
    first = True
    while True:
        character = buffer.peek()
        if in_array and character == "]":
            buffer.take(1)
            if buffer.peek():
                raise buffer.broken()
            return
        if not in_array and not character:
            return
        if in_array and not first:
            if character != ",":
                raise buffer.broken()
            buffer.take(1)
            buffer.peek()
        yield buffer.line, buffer.value(max_characters)
        first = False


class _Buffer:
    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._decoder = json.JSONDecoder(parse_int=self._integer)
        self._problem: str | None = None
        self._text = ""
        self._position = 0
        self._column = 1
        self._ended = False
        self.line = 1

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._position)
            assert match is not None
            self.take(match.end() - self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more():
                return ""

    def take(self, count: int) -> None:
        """Step over ``count`` characters."""
        end = self._position + count
        lines = self._text.count("\n", self._position, end)
        if lines:
            self.line += lines
            self._column = end - self._text.rindex("\n", self._position, end)
        else:
            self._column += count
        self._position = end

    def value(self, max_characters: int) -> Any:
        """The JSON value here."""
        while True:
            self._problem = None
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except (json.JSONDecodeError, RecursionError) as error:
                # Wrong, or merely not read to its end yet: only more text can tell. (Reading on moves positions.)
                ahead = max(0, getattr(error, "pos", self._position) - self._position)
                if len(self._text) - self._position <= max_characters and self._grow():
                    continue
                self.take(ahead)
                raise self.broken() from error
            # A number may go on in the next chunk; objects and arrays end where they end.
            if self._text[end : end + 1] in _NUMBER_GOES_ON and self._more():
                continue
            self.take(end - self._position)
            return Unusable(self._problem) if self._problem else value

    def _integer(self, digits: str) -> int:
        try:
            return int(digits)
        except ValueError:
            self._problem = f"holds an integer of {len(digits):,} digits"
            return 0

    def _grow(self) -> bool:
        """Double what is in view, which keeps the repeated parsing linear; False at the end of the stream."""
        wanted = 2 * (len(self._text) - self._position)
        grown = False
        while self._more():
            grown = True
            if len(self._text) >= wanted:
                break
        return grown

    def broken(self) -> BrokenJson:
        """The error for what stands here."""
        return BrokenJson(self.line, self._column, self._text[self._position : self._position + 30] or "the file ends")

    def _more(self) -> bool:
        """Read on; False at the end of the stream."""
        if self._ended:
            return False
        chunk = self._stream.read(CHUNK_CHARACTERS)
        self._ended = not chunk
        self._text = self._text[self._position :] + chunk
        self._position = 0
        return bool(chunk)
