"""What is said between training and a tracker's process: one JSON object a line, each answered by one."""

from __future__ import annotations

from typing import Any, Protocol

from finetune_api.base import ApiModel
from finetune_api.spec import TrackerType
from finetune_trainer.trackers.lines import Known, Line


class Opening(ApiModel):
    """Which run is told, and where."""

    type: TrackerType
    project: str
    run_name: str
    job: str
    """namespace/name of the FineTuneJob."""
    run_id: str
    """The FineTuneJob's UID: the same for every execution."""
    endpoint: str | None = None
    slot: str
    secret_name: str | None = None
    secret_folder: str | None = None
    """Where the Secret is mounted. It is read by the tracker's process, whenever one starts."""
    work_dir: str
    config: dict[str, Any]
    """What the run was made from, without secrets."""


class Opened(ApiModel):
    """The answer."""

    url: str | None = None
    step: int
    evaluation: int


class Ending(ApiModel):
    """The last message."""

    summary: dict[str, Any] = {}
    """Final metrics and where the results lie."""
    failed: bool = False


class Request(ApiModel):
    """One of them at a time."""

    open: Opening | None = None
    log: list[dict[str, Any]] | None = None
    finish: Ending | None = None


class Reply(ApiModel):
    """Neither: it is done."""

    opened: Opened | None = None
    error: str | None = None


class Run(Protocol):
    """A run in a tracker's library. Any call may raise what the library raises, and take for ever."""

    @property
    def url(self) -> str | None:
        """Where a person finds it."""

    @property
    def known(self) -> Known:
        """What it had when it was opened."""

    def log(self, lines: list[Line]) -> None:
        """Tell it of lines, in order, none twice."""

    def finish(self, summary: dict[str, Any], failed: bool) -> None:
        """Deliver everything and end the run."""


class TrackerError(Exception):
    """A tracker does not do what it should."""
