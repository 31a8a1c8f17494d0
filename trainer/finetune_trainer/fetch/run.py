"""The fetch stage: brings the base model into the cache that jobs share while the training Job waits in its queue.

Nothing waits for it. Where it fails, training fetches the model itself; where training begins before it is done, training waits for
the entry that it fills, and whoever comes after one that was killed goes on where that stopped.
"""

from __future__ import annotations

from finetune_api.results import PREPARE_RESULT, FetchReport, PrepareResult
from finetune_trainer.context import StageContext
from finetune_trainer.sources.ahead import fetch_ahead
from finetune_trainer.stored import read_stored
from finetune_trainer.waiting import wait_until_available


def run(ctx: StageContext) -> FetchReport:
    """Fetch the commit that prepare found.

    Raises:
        StageError: what the model's source raises for good; what somebody can mend is waited for.
    """
    prepared = wait_until_available(ctx, lambda: read_stored(ctx.workspace_store(), PREPARE_RESULT, PrepareResult))
    return FetchReport(cached=fetch_ahead(ctx, prepared.model_commit))
