"""One tracker, told of a run by a thread of its own for as long as it trains."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune_api.results import TrackedRun
from finetune_trainer.trackers.child import COMMAND, Child
from finetune_trainer.trackers.lines import Known, Line
from finetune_trainer.trackers.protocol import Ending, Opening, Request, TrackerError

log = logging.getLogger(__name__)

BATCH = 100
"""Lines of one request."""
POLL_SECONDS = 1.0
OPEN_SECONDS, LOG_SECONDS = 90.0, 60.0
LAST_SECONDS = 3600.0
"""The end has no limit of its own: whoever waits for it has."""
TRIES_AT_THE_END = 2


@dataclass(frozen=True)
class Source:
    """Where lines come from: lists that only grow, once training has begun. They are kept for the report in any case, so what waits for a
    tracker takes no memory and need never be dropped."""

    first: list[Line]
    steps: Callable[[], Sequence[Line]]
    evaluations: Callable[[], Sequence[Line]]

    def all(self) -> list[Line]:
        """Everything there is now."""
        return [*self.first, *self.steps(), *self.evaluations()]


@dataclass
class Cursor:
    """How far a source has been read."""

    source: Source
    first: int = 0
    steps: int = 0
    evaluations: int = 0

    def next(self) -> list[Line]:
        """Some more lines, a step's before its evaluation."""
        first = self.source.first[self.first :]
        steps = list(self.source.steps()[self.steps : self.steps + BATCH])
        # Steps that are still behind come first.
        due = [e for e in self.source.evaluations()[self.evaluations :] if not steps or e["step"] <= steps[-1]["step"]]
        self.first, self.steps, self.evaluations = (
            self.first + len(first),
            self.steps + len(steps),
            self.evaluations + len(due),
        )
        return sorted([*first, *steps, *due], key=lambda line: int(line["step"]))


@dataclass(frozen=True)
class Pauses:
    """Seconds before a tracker that failed is tried again: twice as long each time."""

    first: float = 15.0
    most: float = 600.0
    at_the_end: float = 2.0


class Feeder:
    """Tells a tracker what there is to tell. A failure ends its process; a later one asks the tracker what it has and goes on from
    there, so a line comes once, in order, however often anything died."""

    def __init__(
        self,
        opening: Opening,
        source: Source,
        pauses: Pauses = Pauses(),
        command: Sequence[str] = COMMAND,
    ) -> None:
        self.opening = opening
        self._source = source
        self._pauses = pauses
        self._command = command
        self._known = Known()
        self._url: str | None = None
        self._problem: str | None = None
        self._ending: Ending | None = None
        self._told_the_end = False
        self._lock = threading.Lock()
        self._child: Child | None = None
        self._stopped = False
        self._wake = threading.Event()
        # A daemon: nothing of it may hold up the end of the process.
        self._thread = threading.Thread(target=self._run, name=f"tracker {opening.type.value}", daemon=True)
        self._thread.start()

    def finish(self, ending: Ending) -> None:
        """There will be no more lines. Does not wait."""
        self._ending = ending
        self._wake.set()

    def done(self, seconds: float) -> bool:
        """Whether it is through, waited for so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def stop(self) -> None:
        """Kill its process, whatever that does."""
        with self._lock:
            self._stopped = True
            if self._child is not None:
                self._child.kill()
        self._wake.set()

    def result(self) -> TrackedRun:
        """What became of it."""
        missing = sum(self._known.lacks(line) for line in self._source.all())
        problem = self._problem
        if problem is None and not self._told_the_end:
            problem = "it was not done in time"
        return TrackedRun(type=self.opening.type, url=self._url, missing_lines=missing, problem=problem)

    def _run(self) -> None:
        pause, tries_left = self._pauses.first, TRIES_AT_THE_END
        while not self._stopped:
            ending = self._ending is not None
            try:
                self._session()
            except (TrackerError, OSError) as error:
                if self._stopped:
                    return
                self._failed(str(error))
            else:
                return
            tries_left -= ending
            if not tries_left:
                return
            self._wake.clear()
            if self._ending is None:
                self._wake.wait(pause)
                pause = min(2 * pause, self._pauses.most)
            else:
                time.sleep(self._pauses.at_the_end)

    def _session(self) -> None:
        """One process, from its start to the end of the run.

        Raises:
            TrackerError, OSError: it cannot go on.
        """
        with self._lock:
            if self._stopped:
                return
            self._child = child = Child(Path(self.opening.work_dir), self._command)
        try:
            opened = child.ask(Request(open=self.opening), OPEN_SECONDS).opened
            assert opened is not None
            self._known = Known(opened.step, opened.evaluation)
            if opened.url != self._url:
                log.info("%s follows this run at %s", self.opening.type.value, opened.url)
            self._url = opened.url
            self._follow(child)
        finally:
            with self._lock:
                self._child = None
            child.close()

    def _follow(self, child: Child) -> None:
        cursor = Cursor(self._source)
        while not self._stopped:
            ending = self._ending
            lines = cursor.next()
            new = [line for line in lines if self._known.lacks(line)]
            if new:
                child.ask(Request(log=[dict(line) for line in new]), LOG_SECONDS)
                self._known = self._known.and_(new)
                self._works()
            elif ending is not None and not lines:
                child.ask(Request(finish=ending), LAST_SECONDS)
                self._told_the_end = True
                self._works()
                return
            elif not lines:
                self._wake.wait(POLL_SECONDS)
                self._wake.clear()

    def _failed(self, problem: str) -> None:
        """Said once, until it works again or another thing is wrong."""
        if problem != self._problem:
            log.warning("%s: %s. Training goes on; it is tried again.", self.opening.type.value, problem)
        self._problem = problem

    def _works(self) -> None:
        if self._problem is not None:
            log.info("%s works again: it is told of everything since", self.opening.type.value)
        self._problem = None
