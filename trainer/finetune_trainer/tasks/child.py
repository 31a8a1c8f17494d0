"""Runs the process that runs lm-eval, and tells its failures in the words of the failure table."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants
from pydantic import ValidationError

from finetune_api.failures import Reason
from finetune_api.names import ENV_LM_EVAL
from finetune_trainer.errors import StageError
from finetune_trainer.sources.hub import PUBLIC_ENDPOINT
from finetune_trainer.tasks.protocol import CACHE, ERROR, Command, Failure, Trouble

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
FIELD = "evaluation.tasks"
SECONDS = 3600
"""For the data of all tasks, or the scores."""
REASONS = {
    Failure.AWAY: Reason.HUB_UNAVAILABLE,
    Failure.NOT_FOUND: Reason.DATASET_NOT_FOUND,
    Failure.NOT_ALLOWED: Reason.ACCESS_DENIED,
    Failure.UNUSABLE: Reason.INVALID_CONFIG,
}


@dataclass(frozen=True)
class Hub:
    """How lm-eval reaches the Hub, or a mirror of it."""

    token: str | None = None
    endpoint: str | None = None
    ca_bundle: Path | None = None

    def environment(self) -> dict[str, str]:
        """Variables of huggingface_hub's, and the trainer's own for a private CA."""
        ca_bundle = str(self.ca_bundle) if self.ca_bundle is not None else None
        given = {"HF_TOKEN": self.token, "HF_ENDPOINT": self.endpoint, "AWS_CA_BUNDLE": ca_bundle}
        if self.token is not None:
            # The trainer's own process, whose environment this one has, sends no token that it was not given by name.
            given["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "0"
        # Xet fetches from its own servers, past a mirror.
        endpoint = (self.endpoint or constants.ENDPOINT).rstrip("/")
        given["HF_HUB_DISABLE_XET"] = "1" if endpoint != PUBLIC_ENDPOINT else None
        return {name: value for name, value in given.items() if value is not None}


def run_harness(command: Command, folder: Path, hub: Hub | None = None) -> None:
    """lm-eval on what lies in the folder; without the Hub, except for the data.

    Raises:
        StageError: DatasetNotFound, AccessDenied, InvalidConfig; HubUnavailable for the data.
    """
    installed = Path(os.environ.get(ENV_LM_EVAL, "")).resolve()
    if not (installed / "lm_eval").is_dir():
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{FIELD} needs lm-eval, and {ENV_LM_EVAL} names no folder that has it: use the trainer image of this version.",
        )
    reach = (hub or Hub()).environment() if command is Command.DATA else OFFLINE
    environment = os.environ | reach
    # Behind everything else: what both need is the trainer's.
    environment["PYTHONPATH"] = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(installed)])
    environment |= {"HF_HOME": str(folder / CACHE), "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_TQDM": "1"}
    environment |= {"HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    # nltk, which some tasks fetch more of, writes into the first of its folders that is there.
    environment["NLTK_DATA"] = str(folder / CACHE / "nltk")
    (folder / CACHE / "nltk").mkdir(parents=True, exist_ok=True)
    environment |= {"DISABLE_MULTIPROC": "1"}  # a pool of forks for bootstrapped errors may hang where threads run
    (folder / ERROR).unlink(missing_ok=True)
    program = [sys.executable, "-m", "finetune_trainer.tasks", command, str(folder)]
    try:
        done = subprocess.run(program, env=environment, timeout=SECONDS, check=False, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        reason = Reason.HUB_UNAVAILABLE if command is Command.DATA else Reason.INVALID_CONFIG
        raise StageError(reason, f"{FIELD}: lm-eval took more than {SECONDS // 60} minutes") from error
    if done.returncode == 0:
        return
    try:
        found = Trouble.model_validate_json((folder / ERROR).read_bytes())
    except (FileNotFoundError, ValidationError):
        found = Trouble(failure=Failure.UNUSABLE, message=f"lm-eval ended with exit code {done.returncode}")
    raise StageError(REASONS[found.failure], f"{FIELD}: {found.message}")
