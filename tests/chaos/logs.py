"""What the containers of a job log, read from the nodes' disks: it goes on while pods, API server and operator are killed."""

from __future__ import annotations

import glob
import io
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from finetune_cluster.instance import Instance

STEP = re.compile(r"step (\d+)/(\d+)  loss")
SAVED = re.compile(r"checkpoint of step (\d+) is in the bucket")
RESUMED = re.compile(r"goes on from the checkpoint of step (\d+)")
RESTARTED = re.compile(r"Starting again in this pod")
LOOK_SECONDS = 0.1


@dataclass(frozen=True)
class Line:
    """A line of a container's log."""

    at: float
    """When the container runtime took it, in seconds since the epoch."""
    stage: str
    pod: str
    uid: str
    text: str

    def number(self, pattern: re.Pattern[str]) -> int | None:
        """The first group of ``pattern`` in it."""
        found = pattern.search(self.text)
        return int(found.group(1)) if found else None

    @property
    def step(self) -> int | None:
        """The training step that it tells of."""
        return self.number(STEP) if self.stage == "train" else None


class StageLogs:
    """Follows every container log of a job; files that the kubelet removes are read to their end. Used as a context."""

    def __init__(self, instance: Instance, namespace: str, job: str) -> None:
        self._folders = [instance.folder(node) / "log" / "pods" for node in instance.nodes]
        self._pattern = f"{namespace}_{job}-*/*/0.log"
        self._files: dict[Path, tuple[io.BufferedReader, bytes]] = {}
        self._lines: list[Line] = []
        self._news = threading.Condition()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> StageLogs:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for file, _rest in self._files.values():
            file.close()

    @property
    def lines(self) -> list[Line]:
        """Everything so far."""
        with self._news:
            return list(self._lines)

    def until(self, found: Callable[[list[Line]], Line | None], seconds: float, what: str) -> Line:
        """Wait until ``found`` gives a line.

        Raises:
            AssertionError: with the end of the log.
        """
        result: Line | None = None

        def look() -> bool:
            nonlocal result
            result = found(self._lines)
            return result is not None

        with self._news:
            if not self._news.wait_for(look, seconds):
                tail = "\n".join(f"{x.pod}: {x.text}" for x in self._lines[-30:])
                raise AssertionError(f"not within {seconds:.0f} s: {what}. The logs end with\n{tail}")
        assert result is not None
        return result

    def _follow(self) -> None:
        while not self._stop.wait(LOOK_SECONDS):
            for folder in self._folders:
                # Not Path.glob: it raises where the kubelet has just removed a pod's folder.
                for path in map(Path, glob.iglob(str(folder / self._pattern))):  # noqa: PTH207
                    if path not in self._files:
                        try:
                            self._files[path] = (path.open("rb"), b"")
                        except FileNotFoundError:
                            continue
            fresh = [line for path in self._files for line in self._read(path)]
            if fresh:
                with self._news:
                    self._lines += sorted(fresh, key=lambda line: line.at)
                    self._news.notify_all()

    def _read(self, path: Path) -> list[Line]:
        file, rest = self._files[path]
        *whole, rest = (rest + file.read()).split(b"\n")
        self._files[path] = (file, rest)
        _, pod, uid = path.parent.parent.name.split("_")
        return [parse(raw.decode(errors="replace"), path.parent.name, pod, uid) for raw in whole]


def parse(raw: str, stage: str, pod: str, uid: str) -> Line:
    """A line as CRI writes it: time (without a fraction's last zeros), stream, flag, text."""
    at, _, rest = raw.partition(" ")
    return Line(datetime.fromisoformat(at).timestamp(), stage, pod, uid, rest.split(" ", 2)[-1])


def steps(lines: list[Line]) -> list[int]:
    """The steps that lines tell of."""
    return [line.step for line in lines if line.step is not None]


def newest_step(lines: list[Line]) -> int:
    """The step that training is at: the last one told, not the highest."""
    return next((line.step for line in reversed(lines) if line.step is not None), 0)


def newest_checkpoint(lines: list[Line]) -> int:
    """The highest step whose checkpoint is complete in the bucket."""
    return max((n for line in lines if (n := line.number(SAVED)) is not None), default=0)


def first_after(lines: list[Line], at: float, wanted: Callable[[Line], bool]) -> Line | None:
    """The first line after a moment that is wanted."""
    return next((line for line in lines if line.at > at and wanted(line)), None)
