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
from pathlib import Path

from pydantic import ValidationError

from finetune_api.progress import StageReport
from finetune_trainer import memory
from finetune_trainer.heartbeat import ENV_HEARTBEAT
from finetune_trainer.supervisor.decide import Ended

ENV_OUTCOME = "FINETUNE_OUTCOME"
DUMP_SECONDS = 5.0
"""A process that hangs is asked for the stacks of its threads first, and given so long to write them."""


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


def run_worker(
    command: Sequence[str], environ: Mapping[str, str], outcome: Path, patience: Patience, stop: Stop
) -> Ended:
    """Start a process and stay until it has ended, in whatever way."""
    outcome.unlink(missing_ok=True)
    kills = memory.kills()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    process = subprocess.Popen(
        list(command),
        env={**environ, ENV_HEARTBEAT: str(writer), ENV_OUTCOME: str(outcome)},
        pass_fds=[writer],
    )
    os.close(writer)
    try:
        watch = _Watch(process, reader, patience, stop)
        watch.until_ended()
    finally:
        os.close(reader)
        if process.poll() is None:  # an error of ours: nothing may go on without a supervisor
            process.kill()
        returncode = process.wait()
    return Ended(
        returncode=returncode,
        report=_read(outcome),
        activity=watch.activity,
        silent_seconds=watch.silent_seconds,
        stop_overdue=watch.stop_overdue,
        told_to_stop=stop.requested,
        memory_kills=memory.kills() - kills,
        peak_bytes=memory.peak_bytes(),
    )


class _Watch:
    def __init__(self, process: subprocess.Popen[bytes], heartbeats: int, patience: Patience, stop: Stop) -> None:
        self._process = process
        self._heartbeats = heartbeats
        self._patience = patience
        self._stop = stop
        self.activity = ""
        self.silent_seconds: float | None = None
        self.stop_overdue = False

    def until_ended(self) -> None:
        """Return when the process has ended."""
        pidfd = os.pidfd_open(self._process.pid)
        with selectors.DefaultSelector() as selector:
            for fd in (pidfd, self._heartbeats, self._stop.fileno()):
                selector.register(fd, selectors.EVENT_READ)
            try:
                self._loop(selector, pidfd)
            finally:
                os.close(pidfd)

    def _loop(self, selector: selectors.BaseSelector, pidfd: int) -> None:
        last_beat = time.monotonic()
        silence = self._patience.start
        told_at: float | None = None
        while True:
            now = time.monotonic()
            if self._stop.requested and told_at is None:
                told_at = now
                selector.unregister(self._stop.fileno())
                self._process.terminate()
            due = told_at + self._patience.stop if told_at is not None else last_beat + silence
            if now >= due:
                self._end(told_at is not None, now - last_beat)
                return
            ready = {key.fd for key, _ in selector.select(due - now)}
            if self._heartbeats in ready:
                data = os.read(self._heartbeats, 65536)
                if data:
                    last_beat, silence = time.monotonic(), self._patience.silence
                    self.activity = data.splitlines()[-1].decode(errors="replace") or self.activity
                else:
                    selector.unregister(self._heartbeats)
            if pidfd in ready:
                return

    def _end(self, told: bool, silent: float) -> None:
        if told:
            self.stop_overdue = True
        else:
            self.silent_seconds = silent
            self._process.send_signal(signal.SIGUSR1)  # faulthandler writes the stacks into the log
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(DUMP_SECONDS)
        self._process.kill()


def _read(path: Path) -> StageReport | None:
    """What the process wrote; nothing where it was killed before or while it wrote."""
    try:
        return StageReport.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
