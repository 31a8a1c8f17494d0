"""``python -m finetune_trainer.trackers.process``: a tracker's process. Reads requests from stdin, answers each on stdout."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import sys
from pathlib import Path
from typing import IO

from finetune_api.spec import TrackerType
from finetune_trainer.credentials import TRACKER_KEYS, Credentials
from finetune_trainer.private import without_credentials
from finetune_trainer.text import readable, shorten
from finetune_trainer.trackers.protocol import Opened, Opening, Reply, Request, Run, TrackerError

PR_SET_PDEATHSIG = 1
HUB_KEYS = ("HF_TOKEN", "HF_ENDPOINT")
NICENESS = 10
"""Training comes first."""
MOST_CHARACTERS = 500
"""Of an error's text: some libraries quote a whole page."""
PUBLIC_KEYS = (
    "WANDB_ENTITY",
    "WANDB_BASE_URL",
    "MLFLOW_TRACKING_URI",
    "TRACKIO_SERVER_URL",
    "TRACKIO_SPACE_ID",
    "HF_ENDPOINT",
)
"""Of a Secret, what an error may name: addresses, which are shown without user and query."""
_ADDRESS = re.compile(r"https?://[^\s'\"<>]+")


def open_run(opening: Opening, secret: dict[str, str]) -> Run:
    """The run, in its library, which is imported only now."""
    if opening.type is TrackerType.WEIGHTS_AND_BIASES:
        from finetune_trainer.trackers.wandb_run import WandbRun

        return WandbRun(opening, secret)
    if opening.type is TrackerType.MLFLOW:
        from finetune_trainer.trackers.mlflow_run import MlflowRun

        return MlflowRun(opening, secret)
    from finetune_trainer.trackers.trackio_run import TrackioRun

    return TrackioRun(opening, secret)


class Server:
    """Does what is asked, and tells what went wrong without telling secrets."""

    def __init__(self) -> None:
        self._run: Run | None = None
        self._secret: dict[str, str] = {}

    def answer(self, text: str) -> Reply:
        """One request."""
        try:
            return self._do(Request.model_validate_json(text))
        except Exception as error:  # noqa: BLE001 - libraries raise anything, and training is told all of it
            return Reply(error=self._explain(error))

    def _do(self, request: Request) -> Reply:
        if request.open is not None:
            opening = request.open
            folder = Path(opening.secret_folder) if opening.secret_folder is not None else None
            values = Credentials(opening.slot, opening.secret_name, folder).values()
            # A Secret may serve other sources too: their keys are not this process's business.
            self._secret = {k: v for k, v in values.items() if k in (*TRACKER_KEYS, *HUB_KEYS)}
            os.environ.update(self._secret)
            self._run = run = open_run(opening, self._secret)
            return Reply(opened=Opened(url=shown(run.url), step=run.known.step, evaluation=run.known.evaluation))
        assert self._run is not None, "nothing is open"
        if request.log is not None:
            self._run.log(list(request.log))
        if request.finish is not None:
            self._run.finish(request.finish.summary, request.finish.failed)
        return Reply()

    def _explain(self, error: Exception) -> str:
        said = " ".join(str(error).split())
        if not isinstance(error, TrackerError):
            said = f"{type(error).__name__}: {said}".removesuffix(": ")
        for key, value in self._secret.items():
            if key not in PUBLIC_KEYS:
                said = said.replace(value, f"<{key}>")
        said = _ADDRESS.sub(lambda match: str(without_credentials(match[0])), said)
        return shorten(readable(said), MOST_CHARACTERS)


def shown(url: str | None) -> str | None:
    """A run's address without credentials; what stands behind # leads to the run."""
    if url is None:
        return None
    address, hash_, fragment = url.partition("#")
    return f"{without_credentials(address)}{hash_}{fragment}"


def serve(requests: IO[str], replies: IO[str]) -> None:
    """Until nobody asks any more."""
    server = Server()
    for text in requests:
        replies.write(server.answer(text).model_dump_json(by_alias=True) + "\n")
        replies.flush()


def main() -> None:
    """Training's own answers leave by a descriptor that no library knows: libraries print to stdout."""
    # A stop is training's matter, which kills this process when it is done; the kernel does if training cannot.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(NICENESS)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(sys.stdin, replies)
    # Libraries wait at exit for what cannot be delivered.
    os._exit(0)


if __name__ == "__main__":
    main()
