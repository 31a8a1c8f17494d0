"""Which execution may write: the newest. One that was declared lost and lives on finds out before it completes anything."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ValidationError

from finetune_api.failures import Reason
from finetune_api.results import TRAIN_OWNER, TrainOwner
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.s3 import S3Store


@dataclass(frozen=True)
class Owner:
    """This execution's claim."""

    workspace: S3Store
    execution_id: str
    number: int

    def check(self) -> None:
        """Before anything is completed, replaced or deleted.

        Raises:
            StageError: Superseded.
        """
        found = read_owner(self.workspace)
        if found is None or found.execution_id != self.execution_id:
            raise superseded(self.workspace, found, self.execution_id)


def claim(workspace: S3Store, execution_id: str, again: bool = False) -> Owner:
    """Take the job over from whichever execution had it.

    Args:
        again: a process that was started again in its pod keeps its claim, and never takes the job back from a later execution.

    Raises:
        StageError: Superseded.
    """
    found = read_owner(workspace)
    if found is not None and found.execution_id == execution_id:
        return Owner(workspace, execution_id, found.number)
    if again and found is not None:
        raise superseded(workspace, found, execution_id)
    number = found.number + 1 if found is not None else 1
    workspace.put_model(TRAIN_OWNER, TrainOwner(execution_id=execution_id, number=number))
    return Owner(workspace, execution_id, number)


def superseded(workspace: S3Store, found: TrainOwner | None, execution_id: str) -> StageError:
    """What to raise where the record names another execution."""
    return StageError(
        Reason.SUPERSEDED,
        f"{workspace.uri(TRAIN_OWNER)} names execution {found.execution_id if found else 'none'}; this is {execution_id}: "
        "nothing more is written.",
    )


def read_owner(workspace: S3Store) -> TrainOwner | None:
    """Who has it; nobody, if the record is missing or unreadable."""
    try:
        return workspace.get_model(TRAIN_OWNER, TrainOwner)
    except (NotFound, ValidationError):
        return None
