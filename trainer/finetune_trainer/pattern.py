"""A user's regular expression: compiled before a GPU is asked for, and never searched for longer than it may take."""

from __future__ import annotations

import re
from collections.abc import Callable

import regex

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError

SEARCH_SECONDS = 1.0
"""For one text. Patterns such as ``(a|a)+$`` may take years for a few dozen characters."""

BRACE = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(?!\d*,?\d*\})", re.DOTALL)
"""What is escaped, a set, or a brace that is no repetition: to Python that is a brace, to regex it may be a fuzzy match."""

Search = Callable[[str], bool]


def compiled(pattern: str) -> Search:
    """Whether the pattern is found in a text; raises TimeoutError where that takes more than SEARCH_SECONDS.

    Raises:
        StageError: InvalidConfig, if it is not a regular expression.
    """
    try:
        # regex, for its timeout, knows more than Python does: fuzzy matches, and recursion, which (seen in 2026.11) takes all memory.
        re.compile(pattern)
        found = regex.compile(BRACE.sub(_literal, pattern))
    except (re.error, regex.error, OverflowError, RecursionError) as error:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"evaluation.generation.regex: {pattern!r} is not a regular expression: {error}. Expected Python's syntax.",
        ) from error
    return lambda text: found.search(text, timeout=SEARCH_SECONDS) is not None


def _literal(found: re.Match[str]) -> str:
    return r"\{" if found[0] == "{" else found[0]


def check_on(search: Search, texts: list[str]) -> None:
    """Search a few texts like those that will be searched.

    Raises:
        StageError: InvalidConfig, if one takes too long.
    """
    for text in texts:
        try:
            search(text)
        except TimeoutError as error:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"evaluation.generation.regex takes more than {SEARCH_SECONDS:g} s on a reference of {len(text):,} characters: it "
                "tries too many ways to match. Avoid what can match one text in many ways inside a repetition, such as (a|a)+.",
            ) from error
