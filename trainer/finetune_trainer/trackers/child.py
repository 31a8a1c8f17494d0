"""A tracker's process, from the side of training: started, asked, killed. Nothing here waits without a limit."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from finetune_trainer.trackers.protocol import Reply, Request, TrackerError

COMMAND = (sys.executable, "-m", "finetune_trainer.trackers.process")
NOT_INHERITED = ("FINETUNE_HEARTBEAT_FD", "HF_HUB_DISABLE_IMPLICIT_TOKEN")
PIECE = 1 << 16


def environment(environ: Mapping[str, str], work_dir: Path) -> dict[str, str]:
    """Of a tracker's process: every file below the work folder, no telemetry, no reports of errors, no GPU, and few and short retries, since
    training tries again itself. Credentials are not in it: the process reads them where they are mounted."""
    own = {
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        # wandb-core, unlike Python, does not look whether it exists.
        "TMPDIR": tempfile.gettempdir(),
        "PYTHONUNBUFFERED": "1",
        "DO_NOT_TRACK": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "WANDB_ERROR_REPORTING": "false",
        "WANDB_SILENT": "true",
        **{f"WANDB_{name}_DIR": str(work_dir / "wandb") for name in ("CACHE", "CONFIG", "DATA", "ARTIFACT")},
        "WANDB_DIR": str(work_dir),
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
        "TRACKIO_DIR": str(work_dir / "trackio"),
    }
    return {**{k: v for k, v in environ.items() if k not in NOT_INHERITED}, **own}


class Child:
    """One process. What it is asked it answers, or it is of no use any more."""

    def __init__(self, work_dir: Path, command: Sequence[str] = COMMAND) -> None:
        work_dir.mkdir(parents=True, exist_ok=True)
        # A session of its own: whatever a library starts goes with it.
        self._process = subprocess.Popen(
            command,
            env=environment(os.environ, work_dir),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._stdin, self._stdout = self._process.stdin.fileno(), self._process.stdout.fileno()
        os.set_blocking(self._stdin, False)
        os.set_blocking(self._stdout, False)

    def ask(self, request: Request, seconds: float) -> Reply:
        """The answer.

        Raises:
            TrackerError: an error is the answer, there is none in time, or the process is gone.
        """
        text = request.model_dump_json(by_alias=True, exclude_none=True) + "\n"
        deadline = time.monotonic() + seconds
        try:
            answer = self._exchange(text.encode(), deadline)
        except TimeoutError:
            raise TrackerError(f"no answer in {seconds:.0f} s") from None
        except OSError:
            answer = b""
        if not answer:
            raise TrackerError(f"its process has ended{self._how()}")
        reply = Reply.model_validate_json(answer)
        if reply.error is not None:
            raise TrackerError(reply.error)
        return reply

    def _exchange(self, to_say: bytes, deadline: float) -> bytes:
        """One line there, one line back; nothing if the process is gone."""
        heard = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self._stdin, selectors.EVENT_WRITE)
            selector.register(self._stdout, selectors.EVENT_READ)
            while not heard.endswith(b"\n"):
                left = deadline - time.monotonic()
                ready = selector.select(left) if left > 0 else []
                if not ready:
                    raise TimeoutError
                for key, _ in ready:
                    if key.fd == self._stdin:
                        to_say = to_say[os.write(self._stdin, to_say[:PIECE]) :]
                        if not to_say:
                            selector.unregister(self._stdin)
                        continue
                    piece = os.read(self._stdout, PIECE)
                    if not piece:
                        return b""
                    heard += piece
        return heard

    def _how(self) -> str:
        try:
            code = self._process.wait(1)
        except subprocess.TimeoutExpired:
            return ""
        return f" with exit code {code}" if code >= 0 else f" by signal {-code}"

    def kill(self) -> None:
        """It and all that it started, from any thread; whoever waits for its answer learns that it is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill it and let go of it."""
        self.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
