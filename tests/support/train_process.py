"""The training container as processes: ``python -m tests.support.train_process ROOT`` is its first process.

ROOT holds what the operator mounts (snapshot/, secrets/, pvc/) and ``pods/<execution>/``, each pod's own disk.
"""

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
from functools import partial
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.names import Stage
from finetune_api.progress import StageReport
from finetune_trainer.context import StageContext, load_context
from finetune_trainer.entrypoint import main
from finetune_trainer.supervisor import run as supervisor
from tests.support.prepared import PreparedJob

ROOT = Path(__file__).resolve().parents[2]
STARTED: list[TrainPod] = []
STEP = re.compile(r"step (\d+)/(\d+)  loss")


def context(root: Path, stage: Stage) -> StageContext:
    """A pod's surroundings, from folders."""
    return load_context(
        stage,
        snapshot_dir=root / "snapshot",
        secrets_dir=root / "secrets",
        pvc_dir=root / "pvc",
        work_dir=root / "pods" / os.environ[names.ENV_POD_UID],
        token_dir=root / "token",
    )


ENV_MOST_ROWS = "TEST_MOST_ROWS"
"""A GPU that holds no more rows at once than this, from the fifth step on."""


def pretend_small_gpu(most_rows: int) -> None:
    """Raise what torch raises where a micro-batch does not fit."""
    import torch

    from finetune_trainer.train.trainer import LoraTrainer

    original = LoraTrainer.compute_loss

    def compute_loss(self: LoraTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.state.global_step >= 4 and len(inputs["input_ids"]) > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return original(self, model, inputs, *args, **kwargs)

    LoraTrainer.compute_loss = compute_loss  # type: ignore[method-assign]


def run(root: Path, arguments: list[str]) -> int:
    """What the image's entry point does."""
    if arguments == ["worker"] and ENV_MOST_ROWS in os.environ:
        pretend_small_gpu(int(os.environ[ENV_MOST_ROWS]))
    command = [sys.executable, "-m", "tests.support.train_process", str(root), "worker"]
    pod = root / "pods" / os.environ[names.ENV_POD_UID]
    pod.mkdir(parents=True, exist_ok=True)
    return main(
        arguments or ["train"],
        termination_log=pod / "termination-log",
        context=partial(context, root),
        stage_function=lambda _: partial(supervisor.run, command=command),
    )


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
            [sys.executable, "-m", "tests.support.train_process", str(self.root)],
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

    def until(self, reached: Callable[[list[str]], bool], seconds: float = 240) -> None:
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

    def worker(self) -> int:
        """Process id of the process that trains now."""
        return int(Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()[-1])

    def wait(self, seconds: float = 240) -> int:
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


if __name__ == "__main__":
    sys.exit(run(Path(sys.argv[1]), sys.argv[2:]))
