"""Rows that templates of the job's own write from columns which fit no format (``template`` of a source)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jinja2
import jinja2.meta
from transformers.utils.chat_template_utils import _compile_jinja_template

from finetune_api.failures import Reason
from finetune_api.spec import RowTemplate
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import FROZEN_NOW
from finetune_trainer.prepare.problems import RowProblem, describe, expected
from finetune_trainer.prepare.rows import RawRow
from finetune_trainer.text import shorten

ROW = "row"
"""The whole row, for columns whose names are no identifiers; a column of that name comes first."""
TURNS = {"user": "prompt", "assistant": "completion"}
"""By role, the field of which a turn is the one message."""


class NoText(Exception):
    """An expression that is neither text nor a number: Jinja would write null as the word None, and a list as Python does."""

    def __init__(self, value: object) -> None:
        super().__init__(describe(value))
        self.value = value


class Templates:
    """The templates of one source, compiled."""

    def __init__(self, template: RowTemplate, field: str) -> None:
        """
        Raises:
            StageError: InvalidConfig, with the line, if one is no template. ``field`` names the source.
        """
        environment = _environment()
        self._parts: dict[str, jinja2.Template] = {}
        self._names: dict[str, frozenset[str]] = {}
        for name, text in template.parts.items():
            try:
                self._names[name] = frozenset(jinja2.meta.find_undeclared_variables(environment.parse(text)))
                self._parts[name] = environment.from_string(text)
            except jinja2.TemplateSyntaxError as error:
                line = text.splitlines()[error.lineno - 1] if error.lineno <= len(text.splitlines()) else ""
                raise StageError(
                    Reason.INVALID_CONFIG,
                    f"{field}.template.{name} is no Jinja template: line {error.lineno}: {error.message}: {shorten(line.strip(), 80)!r}",
                ) from error

    @property
    def columns(self) -> dict[str, str]:
        """Where a format's fields stand in the rows that are written: under names by which problems call the template to blame."""
        return {TURNS.get(name, name): _place(name) for name in self._parts}

    @property
    def wanted(self) -> frozenset[str]:
        """The columns that are read; none, where that cannot be told: then all are."""
        names = frozenset().union(*self._names.values())
        return frozenset() if ROW in names else names

    def written(self, raw: RawRow) -> RawRow:
        """The row that the templates make of this one, or why they make none."""
        if raw.value is None:
            return raw
        try:
            return RawRow(raw.source, {_place(name): self._part(name, raw.value) for name in self._parts})
        except RowProblem as problem:
            return RawRow(raw.source, None, problem.text)

    def _part(self, name: str, row: Mapping[str, Any]) -> Any:
        text = self._text(name, row)
        return [{"role": name, "content": text if text.strip() else ""}] if name in TURNS else text

    def _text(self, name: str, row: Mapping[str, Any]) -> str:
        try:
            return self._parts[name].render({ROW: row, **row})
        except jinja2.UndefinedError as error:
            missing = next(
                (column for column in self._names[name] if error.message == f"'{column}' is undefined"), None
            )
            if missing is not None:
                has = ", ".join(row) or "no columns"
                raise RowProblem(f"{_place(name)}: {missing}: missing; the row has {has}") from None
            raise _failed(name, error) from None
        except NoText as error:
            nulls = sorted(column for column in self._names[name] if column in row and row[column] is None)
            hint = f" ({', '.join(nulls)} is null: write {{{{ {nulls[0]} or '' }}}} where it may be)" if nulls else ""
            problem = expected(_place(name), "text or a number in every {{ }}", error.value)
            raise RowProblem(f"{problem.text}{hint}") from None
        except (
            jinja2.TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise _failed(name, error) from None


def _failed(name: str, error: Exception) -> RowProblem:
    """What it says may quote the row: it stands after "found"."""
    return RowProblem(
        f"{_place(name)}: expected a row that it can write, found one that fails: {shorten(str(error), 160)}"
    )


def _place(name: str) -> str:
    return f"template.{name}"


def _environment() -> jinja2.Environment:
    """That of chat templates, in its sandbox; but what is missing or no text is an error, and a text keeps the newline at its end."""
    environment: jinja2.Environment = _compile_jinja_template("").environment.overlay(
        undefined=jinja2.StrictUndefined, finalize=_finalized, keep_trailing_newline=True
    )
    environment.globals["strftime_now"] = FROZEN_NOW.strftime
    return environment


def _finalized(value: object) -> object:
    if isinstance(value, jinja2.Undefined):
        return str(value)  # raises
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    raise NoText(value)
