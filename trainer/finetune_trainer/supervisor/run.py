"""The train stage as its container sees it: a process that trains, again and again while that can help."""

from __future__ import annotations

import json
import logging
import os
import random
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import partial

from pydantic import BaseModel, TypeAdapter

from finetune_api.base import ApiModel
from finetune_api.failures import Reason
from finetune_api.names import ENV_GRACE_SECONDS
from finetune_api.progress import Restart, Split
from finetune_api.results import TrainReport
from finetune_api.snapshot import saving_seconds
from finetune_trainer.context import StageContext
from finetune_trainer.errors import Interrupted, StageError
from finetune_trainer.supervisor.decide import Again, Failed, Limits, Succeeded, Tally, decide
from finetune_trainer.supervisor.place import place_of
from finetune_trainer.supervisor.process import Patience, Stop
from finetune_trainer.supervisor.team import Alone, Follower, Leader
from finetune_trainer.text import shorten

log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "finetune_trainer", "worker")
ENV_SPLIT = "FINETUNE_SPLIT"
ENV_RESTARTS = "FINETUNE_RESTARTS"
MOST_RESTARTS_TOLD = 16
SPLIT_FILE = "split.json"
START_SECONDS = 600.0
FRUITFUL_SECONDS = 3600.0
"""Ranks that worked for so long got somewhere: earlier restarts count no more."""
RESTARTS = TypeAdapter(list[Restart])


class PodDone(ApiModel):
    """What another pod than the first reports: nothing."""


def run(ctx: StageContext, *, command: Sequence[str] = WORKER, environ: Mapping[str, str] = os.environ) -> BaseModel:
    """Train in processes of their own; the result is what the first one reported.

    Raises:
        StageError: what a process reported, or what became of it; PodsMissing.
        Interrupted: the container was told to stop.
    """
    recovery = ctx.snapshot.spec.recovery
    place = place_of(ctx.snapshot.spec, environ)
    grace = float(environ.get(ENV_GRACE_SECONDS) or recovery.termination_grace_period_seconds)
    silence = float(recovery.hung_timeout_seconds)
    patience = Patience(silence=silence, start=max(silence, START_SECONDS), stop=saving_seconds(grace))
    key = f"{ctx.snapshot.job.uid}/{ctx.snapshot.digest()}"
    placement = placement_limit(recovery.placement_timeout_seconds)
    with Stop() as stop:
        if place.index:
            Follower(place, key, placement, environ).follow(command, ctx.work_dir, patience.stop, stop)
            return PodDone()
        team = Leader(place, key, placement, partial(_tell, ctx), _given) if place.nodes > 1 else Alone(place)
        report = _lead(ctx, team, command, environ, place.ranks, patience, stop)
        team.close()
        return report


def placement_limit(seconds: float) -> float:
    """How long this execution holds its place while others of the job have none: up to half as long again as is asked for. Several jobs
    that each got some of the GPUs they need must not all give them back at the same moment."""
    return seconds * random.uniform(1.0, 1.5)  # noqa: S311 - nothing to guess


def _lead(
    ctx: StageContext,
    team: Alone | Leader,
    command: Sequence[str],
    environ: Mapping[str, str],
    ranks: int,
    patience: Patience,
    stop: Stop,
) -> TrainReport:
    recovery = ctx.snapshot.spec.recovery
    limits = Limits(tuple(recovery.out_of_memory.actions), ctx.snapshot.spec.training.global_batch_sequences, ranks)
    split: Split | None = None
    restarts: list[Restart] = []
    tally = Tally()
    while True:
        given = {ENV_RESTARTS: RESTARTS.dump_json(restarts, by_alias=True).decode()}
        if split is not None:
            given[ENV_SPLIT] = json.dumps(split.to_json_dict())
        began = time.monotonic()
        ended = team.run(command, {**environ, **given}, ctx.work_dir, patience, stop)
        if time.monotonic() - began - (ended.silent_seconds or 0.0) >= FRUITFUL_SECONDS:
            tally = Tally()
        decision = decide(ended, split or used_split(ctx), limits, tally)
        if isinstance(decision, Succeeded):
            return TrainReport.model_validate(decision.report.result)
        if isinstance(decision, Failed):
            if decision.reason is Reason.INTERRUPTED:
                raise Interrupted(decision.message, decision.result)
            raise StageError(decision.reason, decision.message)
        if decision.split != (split or used_split(ctx)):
            split = decision.split
        tally.restarts[decision.reason] = tally.restarts.get(decision.reason, 0) + 1
        restarts = [*restarts, restart(decision)][-MOST_RESTARTS_TOLD:]
        log.warning("%s Starting again in this pod (restart %d).", decision.message, len(restarts))
        ctx.reporter.report(restarts=restarts, **({"split": split} if split else {}))


def _tell(ctx: StageContext, missing: str) -> None:
    if missing:
        log.info("waiting: %s", missing)
        ctx.reporter.set_waiting(Reason.PODS_MISSING, missing)
    else:
        ctx.reporter.clear_waiting()


def _given(environ: Mapping[str, str]) -> dict[str, str]:
    """What the ranks of other pods need to know, too."""
    return {name: environ[name] for name in (ENV_RESTARTS, ENV_SPLIT) if name in environ}


def restart(decision: Again) -> Restart:
    """For status and Events."""
    return Restart(
        at=datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        reason=decision.reason,
        message=shorten(decision.message, 1024),
    )


def used_split(ctx: StageContext) -> Split:
    """The split that the process wrote down when it began to train: an earlier execution may have made it smaller than planned."""
    path = ctx.work_dir / SPLIT_FILE
    return Split.model_validate_json(path.read_bytes()) if path.exists() else ctx.snapshot.split
