"""The base model is brought into the cache while training waits in its queue, by a Job of its own that nothing waits for."""

from __future__ import annotations

from finetune_api.names import Stage
from finetune_operator.planning import phases
from finetune_operator.planning.decision import Decision
from finetune_operator.planning.look import Look
from finetune_operator.planning.model import DeleteJob, StageState
from finetune_operator.planning.waiting import next_look


def fetch_while_queued(look: Look) -> Decision | None:
    """Create the fetch Job, once for each time that prepare said that the base model is not in the cache, as long as no training pod runs.

    The training Job has joined its queue before: the wait there is what the fetch is to be hidden in.
    """
    report = look.prepare_report
    waits = look.stage is Stage.TRAIN and look.view.state in (StageState.QUEUED, StageState.STARTING)
    if report is None or not report.fetch_pending or not waits:
        return None
    prepare, there = look.views[Stage.PREPARE].job, look.fetch_job
    if there is not None:
        # Prepare has run again since, and found the cache without the model: what an earlier fetch did is gone.
        old = there.finished and not there.deleting and prepare is not None and there.created < prepare.created
        return phases.current(look, deletes=(DeleteJob(there.name, there.uid),)) if old else None
    refusal, again = look.obs.fetch_refusal, next_look(look.obs, look.view, look.config)
    if refusal is not None and refusal.for_good:
        return None
    if refusal is not None and refusal.retry_at > look.now:
        return phases.current(look, requeue_at=min(again or refusal.retry_at, refusal.retry_at))
    return phases.current(look, create=Stage.FETCH, requeue_at=again)
