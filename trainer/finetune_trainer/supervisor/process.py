"""One training process: started, listened to, stopped, and what it left."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Protocol

from pydantic import ValidationError

from finetune_api.failures import FAILURES, Reason
from finetune_api.progress import StageReport
from finetune_trainer import memory
from finetune_trainer.heartbeat import ENV_HEARTBEAT
from finetune_trainer.supervisor.decide import TRAINING, Ended

INTERRUPTED = FAILURES[Reason.INTERRUPTED].exit_code
ENV_OUTCOME = "FINETUNE_OUTCOME"
DUMP_SECONDS = 5.0
"""A process that hangs is asked for the stacks of its threads first, and given so long to write them."""
LEAVE_SECONDS = 5.0
"""For those that are left when one of several that were told to stop has ended, if they have nothing to save."""


@dataclass(frozen=True)
class Patience:
    """How long is waited, in seconds."""

    silence: float
    """For a sign of life, after the first."""
    start: float
    """For the first: importing torch from a cold disk takes minutes."""
    stop: float
    """After SIGTERM."""


class Stop:
    """SIGTERM, as something to select on. Used as a context: the handler of before is put back."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.requested = False

    def __enter__(self) -> Stop:
        self._before = signal.signal(signal.SIGTERM, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)
        os.close(self._reader)
        os.close(self._writer)

    def _on_signal(self, _signum: int, _frame: object) -> None:
        self.requested = True
        with contextlib.suppress(BlockingIOError):
            os.write(self._writer, b"x")

    def fileno(self) -> int:
        """Readable once SIGTERM has come."""
        return self._reader


class Word(StrEnum):
    """What other pods' news mean for the ranks of this one."""

    GO_ON = "GoOn"
    LEAVE = "Leave"
    """All ranks were told to stop together: those that train agree on a step, and the first one saves it."""
    ABORT = "Abort"
    """Others are gone: no rank gets any farther."""


class Others(Protocol):
    """Other pods whose ranks train with these."""

    def fileno(self) -> int:
        """Readable when they have said something."""

    def heard(self) -> Word:
        """Take it up; what follows for the ranks here."""

    def beat(self) -> None:
        """A rank here has shown a sign of life."""


@dataclass
class _Worker:
    """One rank's process."""

    process: subprocess.Popen[bytes]
    heartbeats: int
    outcome: Path
    pidfd: int
    activity: str = ""

    @property
    def report(self) -> StageReport | None:
        return _read(self.outcome)


def run_workers(
    command: Sequence[str],
    environs: Sequence[Mapping[str, str]],
    folder: Path,
    patience: Patience,
    stop: Stop,
    others: Others | None = None,
) -> Ended:
    """Start one process per environment and stay until all have ended. The first that fails takes the others along, and it is
    the one that is told of.

    Args:
        others: other pods, that may end this, too.
    """
    kills = memory.kills()
    workers: list[_Worker] = []
    try:
        for rank, environ in enumerate(environs):
            workers.append(_start(command, environ, folder / f"outcome-{rank}.json"))
        watch = _Watch(workers, patience, stop, others)
        watch.until_ended()
    finally:
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.kill()
            worker.process.wait()
            os.close(worker.heartbeats)
            os.close(worker.pidfd)
    # Ranks that were told to stop all leave; the first one has saved, and knows what.
    together = stop.requested or watch.left_together
    told = workers[0] if together and not watch.stop_overdue else watch.first_failed or workers[0]
    return Ended(
        returncode=told.process.returncode,
        report=told.report,
        activity=told.activity,
        silent_seconds=watch.silent_seconds,
        stop_overdue=watch.stop_overdue,
        told_to_stop=stop.requested,
        memory_kills=memory.kills() - kills,
        peak_bytes=memory.peak_bytes(),
        rank=workers.index(told) if len(workers) > 1 else None,
        aborted=watch.aborted,
    )


def _start(command: Sequence[str], environ: Mapping[str, str], outcome: Path) -> _Worker:
    outcome.unlink(missing_ok=True)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        process = subprocess.Popen(
            list(command),
            env={**environ, ENV_HEARTBEAT: str(writer), ENV_OUTCOME: str(outcome)},
            pass_fds=[writer],
        )
    finally:
        os.close(writer)
    return _Worker(process, reader, outcome, os.pidfd_open(process.pid))


class _Watch:
    def __init__(self, workers: Sequence[_Worker], patience: Patience, stop: Stop, others: Others | None) -> None:
        self._running = list(workers)
        self._first = workers[0]
        self._patience = patience
        self._stop = stop
        self._others = others
        self.aborted = False
        self.left_together = False
        self.first_failed: _Worker | None = None
        self.silent_seconds: float | None = None
        self.stop_overdue = False
        self._leave_by: float | None = None

    def until_ended(self) -> None:
        """Return when every process has ended, or must."""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stop.fileno(), selectors.EVENT_READ)
            if self._others is not None:
                selector.register(self._others.fileno(), selectors.EVENT_READ, self._others)
            for worker in self._running:
                selector.register(worker.heartbeats, selectors.EVENT_READ, worker)
                selector.register(worker.pidfd, selectors.EVENT_READ, worker)
            self._loop(selector)

    def _loop(self, selector: selectors.BaseSelector) -> None:
        last_beat, silence = time.monotonic(), self._patience.start
        told_at: float | None = None
        while self._running:
            now = time.monotonic()
            if self._stop.requested and told_at is None:
                told_at = now
                selector.unregister(self._stop.fileno())
                for worker in self._running:
                    worker.process.terminate()
            due = told_at + self._patience.stop if told_at is not None else last_beat + silence
            if self._leave_by is not None and self._leave_by < due:
                due = self._leave_by
                if now >= due:
                    self.aborted = not self._stop.requested
                    return
            if now >= due:
                self._end(told_at is not None, now - last_beat)
                return
            for key, _ in selector.select(due - now):
                worker = key.data
                if worker is None:
                    continue
                if worker is self._others:
                    if not self._stop.requested and self._must_leave(self._others.heard()):
                        return
                    last_beat = time.monotonic()  # what is said is a sign of life
                    continue
                if key.fd == worker.heartbeats:
                    data = os.read(key.fd, 65536)
                    if data:
                        last_beat, silence = time.monotonic(), self._patience.silence
                        if self._others is not None:
                            self._others.beat()
                        worker.activity = data.splitlines()[-1].decode(errors="replace") or worker.activity
                    else:
                        selector.unregister(key.fd)
                elif not self._ended(worker, selector):
                    return

    def _ended(self, worker: _Worker, selector: selectors.BaseSelector) -> bool:
        """One has ended; whether the others may go on."""
        selector.unregister(worker.pidfd)
        self._running.remove(worker)
        if worker.process.wait() == 0:
            return True
        self.first_failed = self.first_failed or worker
        if worker.process.returncode == INTERRUPTED and not self._stop.requested:
            # Another pod was told to stop, and all ranks agreed to: the first one may still save.
            self.left_together = True
            return not self._must_leave(Word.LEAVE)
        # One that fails leaves the others waiting for it for ever, and no signal reaches a rank that waits for its GPU. Ranks that
        # train and were told to stop agree on a step, and the first one saves it; elsewhere there is nothing to save.
        if self._stop.requested and (worker is self._first or self._first.activity != TRAINING):
            self._leave_by = self._leave_by or time.monotonic() + LEAVE_SECONDS
        return self._stop.requested

    def _must_leave(self, word: Word) -> bool:
        """Whether other pods' news end the ranks here at once."""
        if word is Word.ABORT:
            self.aborted = True
        elif word is Word.LEAVE and self._leave_by is None:
            saving = self._patience.stop if self._first.activity == TRAINING else LEAVE_SECONDS
            self._leave_by = time.monotonic() + saving
        return self.aborted

    def _end(self, told: bool, silent: float) -> None:
        if told:
            self.stop_overdue = True
        else:
            self.silent_seconds = silent
            for worker in self._running:
                worker.process.send_signal(signal.SIGUSR1)  # faulthandler writes the stacks into the log
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._running[0].process.wait(DUMP_SECONDS)
        self.first_failed = self._running[0]


def _read(path: Path) -> StageReport | None:
    """What the process wrote; nothing where it was killed before or while it wrote."""
    try:
        return StageReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
