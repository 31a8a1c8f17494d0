"""A stage's surroundings without a cluster: for commands that run a stage's code where somebody sits in front of it."""

from __future__ import annotations

from pathlib import Path

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.snapshot import Images, JobIdentity, make_snapshot
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.reporter import Reporter

NOBODY = "00000000-0000-0000-0000-000000000000"
"""The UID of a job that no cluster has."""


class Impatient(Reporter):
    """Nobody will mend what a pod would wait for: whoever called is here and wants to be told."""

    def set_waiting(self, reason: Reason, message: str) -> None:
        """Raises StageError with what is waited for."""
        raise StageError(reason, message)


def context_here(name: str, spec: FineTuneJobSpec, folder: Path, volumes: Path | None) -> StageContext:
    """The prepare stage's context.

    Args:
        spec: without Secrets, so that boto3 and huggingface_hub look for credentials themselves.
        folder: for what is downloaded.
        volumes: folder of the claims that pvc:// sources name.
    """
    job = JobIdentity(name=name, namespace="default", uid=NOBODY, generation=1)
    snapshot = make_snapshot(spec, job, Images(prepare="", train=""), "")
    return StageContext(
        snapshot=snapshot,
        stage=Stage.PREPARE,
        execution_id=NOBODY,
        work_dir=folder / "work",
        secrets_dir=folder / "secrets",
        pvc_dir=volumes or folder / "volumes",
        reporter=Impatient(Stage.PREPARE, NOBODY),
        cache_dir=folder / "cache",
    )
