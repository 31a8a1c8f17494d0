"""Pods that train, as processes (see train_container): started, listened to, killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from finetune_api import names
from finetune_api.progress import StageReport
from tests.support.prepared import PreparedJob

ROOT = Path(__file__).resolve().parents[2]
STARTED: list[TrainPod] = []
STEP = re.compile(r"step (\d+)/(\d+)  loss")


@dataclass
class TrainPod:
    """A pod: started, listened to, killed."""

    root: Path
    execution: str = field(default_factory=lambda: str(uuid.uuid4()))
    environ: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)
    _ended: bool = False

    def start(self) -> TrainPod:
        """Start it; its log is read in a thread."""
        environ = {
            **os.environ,
            names.ENV_POD_UID: self.execution,
            "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "api", "trainer", "cluster")),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            **self.environ,
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.train_container", str(self.root)],
            env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
        )  # fmt: skip
        STARTED.append(self)
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        return self

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            with self._news:
                self.lines.append(line.rstrip())
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def until(self, reached: Callable[[list[str]], bool], seconds: float = 480) -> None:
        """Wait until the log says so."""
        with self._news:
            ok = self._news.wait_for(lambda: reached(self.lines) or self._ended, seconds)
            assert ok, self.log
            assert reached(self.lines), self.log

    def until_step(self, step: int) -> None:
        """Wait until a step is made."""
        self.until(lambda lines: any(step <= made for made in steps(lines)))

    def kill(self) -> None:
        """kill -9 of every process of the pod."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def workers(self) -> list[int]:
        """Process ids of the processes that train now, by rank."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def worker(self) -> int:
        """That of the last one."""
        return self.workers()[-1]

    def wait(self, seconds: float = 600) -> int:
        """Its exit code."""
        code = self.process.wait(seconds)
        self._reader.join(10)
        return code

    @property
    def log(self) -> str:
        """What it wrote."""
        return "\n".join(self.lines)

    @property
    def report(self) -> StageReport:
        """Its termination message."""
        path = self.root / "pods" / self.execution / "termination-log"
        return StageReport.model_validate_json(path.read_bytes())


def kill_all() -> None:
    """What a test that failed left running."""
    while STARTED:
        pod = STARTED.pop()
        if pod.process.poll() is None:
            pod.kill()


def steps(lines: list[str]) -> list[int]:
    """The steps that a log tells of."""
    return [int(found.group(1)) for line in lines if (found := STEP.search(line))]


def pod_of(job: PreparedJob, **environ: str) -> TrainPod:
    """A new pod of a job."""
    mount = job.folder / "snapshot"
    mount.mkdir(exist_ok=True)
    (mount / names.SNAPSHOT_KEY).write_text(job.snapshot.canonical_json())
    return TrainPod(job.folder, environ=environ)
