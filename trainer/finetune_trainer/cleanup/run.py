"""The cleanup stage: deletes everything that a job left in its bucket, unfinished uploads too, after its FineTuneJob was deleted.

The prefixes end in the job's own UID, so nothing of another job can be below them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from finetune_api.failures import Reason
from finetune_api.results import CleanupReport
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.s3 import S3Store
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)


def run(ctx: StageContext) -> CleanupReport:
    """Delete the output and the workspace. Storage that is away is waited for; the Job's deadline ends that.

    Raises:
        StageError: AccessDenied, and what stores raise.
    """
    objects = 0
    for store in (ctx.output_store, ctx.workspace_store):
        objects += wait_until_available(ctx, lambda store=store: delete_all(store))  # type: ignore[misc]
    return CleanupReport(objects=objects)


def delete_all(connect: Callable[[], S3Store]) -> int:
    """How many objects were deleted; a bucket that is gone holds none. Uploads that were never completed go first: they are listed
    nowhere, and one that is completed now would be an object that stays."""
    store = connect()
    try:
        store.abort_orphans()
        count = store.delete_prefix("")
    except StageError as error:
        if error.reason is not Reason.BUCKET_NOT_FOUND:
            raise
        count = 0
    log.info("deleted %d objects below %s", count, store.uri())
    return count
