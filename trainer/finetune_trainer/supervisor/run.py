"""The train stage as its container sees it: a process that trains, again and again while that can help."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

from pydantic import BaseModel, TypeAdapter

from finetune_api.failures import Reason
from finetune_api.names import ENV_ENDPOINT, ENV_GPUS_PER_NODE, ENV_GRACE_SECONDS
from finetune_api.progress import Restart, Split
from finetune_api.results import TrainReport
from finetune_api.snapshot import rank_count, saving_seconds
from finetune_trainer.context import StageContext
from finetune_trainer.errors import Interrupted, StageError
from finetune_trainer.supervisor.decide import Again, Failed, Limits, Succeeded, Tally, decide
from finetune_trainer.supervisor.process import Patience, Stop, run_workers
from finetune_trainer.text import shorten

log = logging.getLogger(__name__)

WORKER = (sys.executable, "-m", "finetune_trainer", "worker")
ENV_LOG_LEVEL = "FINETUNE_LOG_LEVEL"
ENV_RANK = "FINETUNE_RANK"
ENV_RANKS = "FINETUNE_RANKS"
ENV_RENDEZVOUS = "FINETUNE_RENDEZVOUS"
ENV_SPLIT = "FINETUNE_SPLIT"
ENV_RESTARTS = "FINETUNE_RESTARTS"
MOST_RESTARTS_TOLD = 16
SPLIT_FILE = "split.json"
START_SECONDS = 600.0
RESTARTS = TypeAdapter(list[Restart])


def run(ctx: StageContext, *, command: Sequence[str] = WORKER, environ: Mapping[str, str] = os.environ) -> BaseModel:
    """Train in a process of its own; the result is what that process reported.

    Raises:
        StageError: what the process reported, or what became of it.
        Interrupted: the container was told to stop.
    """
    recovery = ctx.snapshot.spec.recovery
    # What the pod has, as Auto may have become any number.
    ranks = max(1, int(environ.get(ENV_GPUS_PER_NODE) or rank_count(ctx.snapshot.spec)))
    limits = Limits(tuple(recovery.out_of_memory.actions), ctx.snapshot.spec.training.global_batch_sequences, ranks)
    grace = float(environ.get(ENV_GRACE_SECONDS) or recovery.termination_grace_period_seconds)
    silence = float(recovery.hung_timeout_seconds)
    patience = Patience(silence=silence, start=max(silence, START_SECONDS), stop=saving_seconds(grace))
    split: Split | None = None
    restarts: list[Restart] = []
    tally = Tally()
    with Stop() as stop:
        while True:
            given = {ENV_RESTARTS: RESTARTS.dump_json(restarts, by_alias=True).decode()}
            if split is not None:
                given[ENV_SPLIT] = json.dumps(split.to_json_dict())
            environs = rank_environs(
                {**environ, **given}, ranks, ctx.work_dir / f"rendezvous-{sum(tally.restarts.values())}"
            )
            ended = run_workers(command, environs, ctx.work_dir, patience, stop)
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


def rank_environs(environ: Mapping[str, str], ranks: int, rendezvous: Path) -> list[dict[str, str]]:
    """The environment of each rank: its number, where it meets the others, and its own GPU of those that the pod sees.

    Only the first one talks to the operator. On a CPU they share the threads.
    """
    if ranks == 1:
        return [dict(environ)]
    rendezvous.unlink(missing_ok=True)
    visible = environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(i) for i in range(ranks))).split(",")
    threads = max(1, len(os.sched_getaffinity(0)) // ranks)
    environs = []
    for rank in range(ranks):
        own = {
            "OMP_NUM_THREADS": str(threads),
            **environ,
            ENV_RANK: str(rank),
            ENV_RANKS: str(ranks),
            ENV_RENDEZVOUS: str(rendezvous),
            "CUDA_VISIBLE_DEVICES": visible[rank] if rank < len(visible) else "",
        }
        if rank:
            own.pop(ENV_ENDPOINT, None)
            own[ENV_LOG_LEVEL] = "WARNING"
        environs.append(own)
    return environs


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
