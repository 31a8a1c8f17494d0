"""How steps are cut into micro-batches now: as planned, or as an out-of-memory error has left it."""

from __future__ import annotations

import os
from collections.abc import Mapping

from pydantic import ValidationError

from finetune_api.progress import Restart, Split
from finetune_api.results import TRAIN_SPLIT, PrepareResult
from finetune_api.snapshot import Snapshot
from finetune_trainer.errors import NotFound
from finetune_trainer.s3 import S3Store
from finetune_trainer.supervisor.run import ENV_RESTARTS, ENV_SPLIT, RESTARTS


def planned_split(snapshot: Snapshot, prepared: PrepareResult) -> Split:
    """What the memory plan chose; without one, what follows from the spec alone."""
    return prepared.plan.split if prepared.plan is not None else snapshot.split


def choose_split(planned: Split, workspace: S3Store, environ: Mapping[str, str] = os.environ) -> Split:
    """What the supervisor says, else what an earlier execution wrote down, else the plan's. A new one is written down, so that
    no later pod finds out again what does not fit."""
    try:
        stored = workspace.get_model(TRAIN_SPLIT, Split)
    except (NotFound, ValidationError):
        stored = planned
    given = environ.get(ENV_SPLIT)
    if given is None:
        return stored
    split = Split.model_validate_json(given)
    if split != stored:
        workspace.put_model(TRAIN_SPLIT, split)
    return split


def given_restarts(environ: Mapping[str, str] = os.environ) -> list[Restart]:
    """The restarts in this pod so far."""
    return RESTARTS.validate_json(environ.get(ENV_RESTARTS) or "[]")
