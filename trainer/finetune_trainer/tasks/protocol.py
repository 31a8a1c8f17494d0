"""What the process that runs lm-eval is given, and what it leaves: JSON files in one folder."""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from finetune_api.base import ApiModel
from finetune_api.results import TaskDataset

ASKED, REQUESTS, REPLIES, SCORES, ERROR = "asked.json", "requests.json", "replies.json", "scores.json", "error.json"
CACHE = "cache"
"""Of Hugging Face's libraries and nltk: the tasks' data."""


class Command(StrEnum):
    """What is to be done."""

    DATA = "data"
    """Fetch them. The others work without the Hub."""
    REQUESTS = "requests"
    """Make them, and try whether answers can be scored."""
    SCORES = "scores"


class AskedTask(ApiModel):
    """One of evaluation.tasks."""

    name: str
    folder: str | None = None
    """Where its own files lie, below the folder."""
    limit: int
    few_shot: int | None = None


class Asked(ApiModel):
    """``asked.json``."""

    tasks: list[AskedTask]
    generates: bool = True
    """False where no GPU holds the whole base: tasks that generate are left out."""


class Continuation(ApiModel):
    """How likely is it after the context?"""

    context: str
    continuation: str


class Generated(ApiModel):
    """What does the model say after the context?"""

    context: str
    until: tuple[str, ...]
    max_new_tokens: int


class Requests(ApiModel):
    """``requests.json``: of all tasks, each once."""

    continuations: list[Continuation] = []
    generated: list[Generated] = []
    left_out: list[str] = []
    """Those of evaluation.tasks that generate, where that is not to be."""
    datasets: list[TaskDataset] = []


class Score(ApiModel):
    """One number of one model."""

    task: str
    metric: str
    filter: str
    value: float
    stderr: float | None = None
    documents: int = 0
    few_shot: int | None = None
    higher_is_better: bool | None = None
    part_of: str | None = None


class Failure(StrEnum):
    """Why it fails."""

    AWAY = "away"
    NOT_FOUND = "not found"
    NOT_ALLOWED = "not allowed"
    UNUSABLE = "unusable"


class Trouble(ApiModel):
    """``error.json``."""

    failure: Failure
    message: str


def generated_of(context: str, settings: dict[str, Any]) -> Generated:
    """A request of lm-eval's ``generate_until``; its aliases of the length are those of HFLM.

    Raises:
        ValueError: it is to be sampled.
    """
    if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
        raise ValueError("it samples its answers, and here they are greedy")
    until = settings.get("until") or []
    lengths = (settings.get(n) for n in ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens"))
    longest = next((int(length) for length in lengths if length is not None), DEFAULT_NEW_TOKENS)
    return Generated(
        context=context, until=(until,) if isinstance(until, str) else tuple(until), max_new_tokens=longest
    )


DEFAULT_NEW_TOKENS = 256
"""Of lm-eval's HFLM."""
