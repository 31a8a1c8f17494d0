"""Signs of life from the training process to its supervisor: one line for everything that gets on."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass

ENV_HEARTBEAT = "FINETUNE_HEARTBEAT_FD"


@dataclass
class _Pulse:
    fd: int | None = None
    activity: str = ""


_pulse = _Pulse()


def open_pipe() -> None:
    """Write to the pipe that the supervisor left open, if there is one."""
    fd = os.environ.get(ENV_HEARTBEAT)
    if fd is not None:
        os.set_blocking(int(fd), False)
        _pulse.fd = int(fd)


def begin(activity: str) -> None:
    """What is done from now on."""
    _pulse.activity = activity
    beat()


def activity() -> str:
    """What was begun last."""
    return _pulse.activity


def beat() -> None:
    """Something got on. Never blocks and never fails: a full pipe has beats enough, and a supervisor that is gone reads none."""
    if _pulse.fd is not None:
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(_pulse.fd, _pulse.activity.encode() + b"\n")
