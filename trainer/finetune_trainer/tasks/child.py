"""Runs the process that runs lm-eval, and tells its failures in the words of the failure table."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from pydantic import ValidationError

from finetune_api.failures import Reason
from finetune_api.names import ENV_LM_EVAL
from finetune_trainer.errors import StageError
from finetune_trainer.tasks.protocol import CACHE, ERROR, Command, Failure, Trouble

FIELD = "evaluation.tasks"
SECONDS = 3600
"""For the data of all tasks, or the scores."""
REASONS = {
    Failure.AWAY: Reason.HUB_UNAVAILABLE,
    Failure.NOT_FOUND: Reason.DATASET_NOT_FOUND,
    Failure.NOT_ALLOWED: Reason.ACCESS_DENIED,
    Failure.UNUSABLE: Reason.INVALID_CONFIG,
}


def run_harness(command: Command, folder: Path, *, token: str | None = None, endpoint: str | None = None) -> None:
    """lm-eval on what lies in the folder; for scores without the Hub.

    Raises:
        StageError: HubUnavailable, DatasetNotFound, AccessDenied, InvalidConfig.
    """
    installed = Path(os.environ.get(ENV_LM_EVAL, "")).resolve()
    if not (installed / "lm_eval").is_dir():
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{FIELD} needs lm-eval, and {ENV_LM_EVAL} names no folder that has it: use the trainer image of this version.",
        )
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if command is Command.SCORES else {}
    hub = {"HF_TOKEN": token, "HF_ENDPOINT": endpoint}
    environment = os.environ | offline | {k: v for k, v in hub.items() if v is not None}
    # Behind everything else: what both need is the trainer's.
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(installed)])
    environment |= {"HF_HOME": str(folder / CACHE), "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TQDM": "1"}
    environment |= {"DISABLE_MULTIPROC": "1"}  # a pool of forks for bootstrapped errors may hang where threads run
    (folder / ERROR).unlink(missing_ok=True)
    program = [sys.executable, "-m", "finetune_trainer.tasks.harness", command, str(folder)]
    try:
        done = subprocess.run(program, env=environment, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise StageError(Reason.HUB_UNAVAILABLE, f"{FIELD}: lm-eval took more than {SECONDS // 60} minutes") from error
    if done.returncode == 0:
        return
    try:
        found = Trouble.model_validate_json((folder / ERROR).read_bytes())
    except (FileNotFoundError, ValidationError):
        found = Trouble(failure=Failure.UNUSABLE, message=f"lm-eval ended with exit code {done.returncode}")
    raise StageError(REASONS[found.failure], f"{FIELD}: {found.message}")
