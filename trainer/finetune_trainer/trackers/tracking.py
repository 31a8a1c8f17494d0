"""A job's trackers, from the first step to the result."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from finetune_api.failures import Consequence
from finetune_api.names import tracker_slot
from finetune_api.results import PrepareResult, TrackedRun, chosen
from finetune_api.snapshot import Snapshot
from finetune_api.spec import Tracker, TrackerType
from finetune_trainer import heartbeat
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.private import shareable, without_credentials
from finetune_trainer.trackers.feeder import Feeder, Source
from finetune_trainer.trackers.lines import Line
from finetune_trainer.trackers.protocol import Ending, Opening
from finetune_trainer.train.held_out_curve import evaluation_line

log = logging.getLogger(__name__)

FLUSH_SECONDS = 30.0
"""So long a GPU is held at most for trackers that are not through, counted from when there was nothing more to tell."""
FAILED_SECONDS = 5.0
"""Likewise after a training that failed for good."""
BEAT_SECONDS = 1.0


class Tracking:
    """Used as a context: when it is left, nothing of any tracker runs any more."""

    def __init__(self, ctx: StageContext) -> None:
        self._ctx = ctx
        self._feeders: list[Feeder] = []
        self._ended = time.monotonic()

    def __enter__(self) -> Tracking:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A training that is told to stop is not held up: the next execution makes good for what was not told."""
        try:
            if isinstance(error, StageError) and error.consequence is Consequence.FAIL:
                self.finish({"final/reason": error.reason.value}, failed=True)
                self._wait(FAILED_SECONDS)
        finally:
            for feeder in self._feeders:
                feeder.stop()

    def follow(
        self,
        prepared: PrepareResult,
        base_loss: float,
        steps: Callable[[], Sequence[Line]],
        evaluations: Callable[[], Sequence[Line]],
    ) -> None:
        """Tell trackers of everything in these lists, and of what will be appended."""
        source = Source([evaluation_line(0, base_loss)], steps, evaluations)
        for tracker in self._ctx.snapshot.spec.trackers or []:
            # TensorBoard's files are made of the finished lists (event_files).
            if tracker.type is not TrackerType.TENSORBOARD:
                self._feeders.append(Feeder(opening(self._ctx, tracker, prepared), source))

    def finish(self, summary: Mapping[str, Any], *, failed: bool = False) -> None:
        """There is nothing more to tell but this. Does not wait."""
        self._ended = time.monotonic()
        for feeder in self._feeders:
            feeder.finish(Ending(summary=dict(summary), failed=failed))

    def results(self) -> list[TrackedRun]:
        """What became of them; waits for those that are not through."""
        self._wait(FLUSH_SECONDS)
        found = [feeder.result() for feeder in self._feeders]
        for run in found:
            if run.problem is not None:
                log.warning("%s", warning(run))
        return found

    def _wait(self, seconds: float) -> None:
        for feeder in self._feeders:
            while (left := self._ended + seconds - time.monotonic()) > 0:
                heartbeat.beat()
                if feeder.done(min(left, BEAT_SECONDS)):
                    break


def opening(ctx: StageContext, tracker: Tracker, prepared: PrepareResult) -> Opening:
    """Which run a tracker is told, and where."""
    job, slot = ctx.snapshot.job, tracker_slot(tracker.type)
    secret = tracker.secret_ref.name if tracker.secret_ref is not None else None
    return Opening(
        type=tracker.type,
        project=tracker.project or job.namespace,
        run_name=tracker.run_name or job.name,
        job=f"{job.namespace}/{job.name}",
        run_id=job.uid,
        endpoint=tracker.endpoint_url,
        slot=slot,
        secret_name=secret,
        secret_folder=str(ctx.secrets_dir / slot) if secret is not None else None,
        work_dir=str(work_folder(ctx, tracker.type)),
        config=configuration(ctx.snapshot, prepared),
    )


def work_folder(ctx: StageContext, kind: TrackerType) -> Path:
    """Where a tracker's library may write."""
    return ctx.work_dir / "trackers" / kind.value.lower()


def configuration(snapshot: Snapshot, prepared: PrepareResult) -> dict[str, Any]:
    """What a run was made from, without what may be secret."""
    plan = chosen(snapshot, prepared).plan
    return {
        "job": {"name": snapshot.job.name, "namespace": snapshot.job.namespace, "uid": snapshot.job.uid},
        "spec": shareable(snapshot.spec),
        "plan": plan.to_json_dict(),
        "data": without_credentials(prepared.data.to_json_dict()),
        "dataHash": prepared.data_hash,
        "modelCommit": prepared.model_commit,
        "snapshotDigest": snapshot.digest(),
    }


def warning(run: TrackedRun) -> str:
    """For the log and the manifest."""
    what = f"; it lacks {run.missing_lines} steps and evaluations, all of which stand in reports/metrics.jsonl"
    return f"{run.type.value}: {run.problem}{what if run.missing_lines else ''}"
