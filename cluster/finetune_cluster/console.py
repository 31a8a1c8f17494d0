"""Progress on stderr: one line a step, and a sign of life every 15 s in long ones. Plain text, so that CI logs stay readable."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SIGN_OF_LIFE_SECONDS = 15.0


class ClusterError(Exception):
    """What is wrong and what to do about it; shown without a traceback."""


def say(message: str) -> None:
    """Print one line of progress."""
    print(message, file=sys.stderr, flush=True)


@contextmanager
def step(what: str) -> Iterator[None]:
    """Announce ``what``, show that it still runs, and say how long it took."""
    say(f"{what} …")
    start, done = time.monotonic(), threading.Event()

    def show_life() -> None:
        while not done.wait(SIGN_OF_LIFE_SECONDS):
            say(f"  … {time.monotonic() - start:.0f} s: still {what[0].lower()}{what[1:]}")

    thread = threading.Thread(target=show_life, daemon=True)
    thread.start()
    try:
        yield
    except BaseException:  # whatever it was, Ctrl-C too: told, and raised again
        done.set()
        say(f"  failed after {time.monotonic() - start:.1f} s: {what}")
        raise
    done.set()
    seconds = time.monotonic() - start
    if seconds >= 1:
        say(f"  {seconds:.1f} s")


def run(
    command: Sequence[str | Path],
    *,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: str | None = None,
    show: bool = False,
) -> str:
    """Run a command that must succeed and return what it printed. It dies with this process, even by kill -9.

    ``show`` lets it print to stderr instead, for long builds.
    """
    argv = ["setpriv", "--pdeathsig", "KILL", *map(str, command)]
    result = subprocess.run(
        argv,
        input=stdin,
        stdin=None if stdin is not None else subprocess.DEVNULL,
        stdout=sys.stderr if show else subprocess.PIPE,
        stderr=None if show else subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
        check=False,
    )
    if result.returncode:
        output = "" if show else f"\n{result.stdout}{result.stderr}".rstrip()
        raise ClusterError(f"{' '.join(map(str, command))} ended with exit code {result.returncode}{output[-8000:]}")
    return result.stdout or ""
