"""Which executions worked on a job: each leaves a note when it begins, because one that is killed leaves nothing later."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from datetime import UTC, datetime

from pydantic import ValidationError

from finetune_api.results import ATTEMPTS_DIR, ExecutionRecord
from finetune_trainer.context import StageContext
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.s3 import S3Store

log = logging.getLogger(__name__)


def note_begin(ctx: StageContext, workspace: S3Store) -> None:
    """Leave the note. It is for people who read the manifest: without it the stage goes on."""
    record = ExecutionRecord(
        stage=ctx.stage,
        execution_id=ctx.execution_id,
        started_at=datetime.now(UTC).isoformat(timespec="milliseconds"),
        completed=False,
    )
    try:
        workspace.put_model(f"{ATTEMPTS_DIR}/{ctx.stage}-{ctx.execution_id}.json", record)
    except (StageError, NotFound) as error:
        log.warning("this execution will not stand in the manifest's attempts: %s", error)


def read_notes(workspace: S3Store) -> list[ExecutionRecord]:
    """All notes there are."""
    notes = []
    for info in list(workspace.list(ATTEMPTS_DIR)):
        try:
            notes.append(workspace.get_model(info.key, ExecutionRecord))
        except (NotFound, ValidationError) as error:
            log.warning("%s is no note of an execution: %s", workspace.uri(info.key), error)
    return notes


def attempts(notes: Iterable[ExecutionRecord], completed: Iterable[ExecutionRecord]) -> list[ExecutionRecord]:
    """Every execution once, those that ended in a result marked, by the time they began (unknown: first)."""
    found = {(n.stage, n.execution_id): n for n in notes}
    for record in completed:
        key = (record.stage, record.execution_id)
        found[key] = found.get(key, record).model_copy(update={"completed": True})
    return sorted(found.values(), key=lambda record: record.started_at or "")
