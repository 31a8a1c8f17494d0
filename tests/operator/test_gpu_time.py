"""GPU time that an earlier version of the operator has counted."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from finetune_api.names import Stage
from finetune_api.status import AttemptStatus, FineTuneJobStatus, GpuTimeStatus
from finetune_operator.planning.clock import rfc3339
from finetune_operator.planning.gpu_time import count_held
from finetune_operator.planning.model import Pod

START = datetime(2026, 3, 1, 12, 0, 0, tzinfo=UTC)
END = START + timedelta(hours=1)


def pod(name: str, since: datetime, until: datetime | None, index: int = 0) -> Pod:
    phase = "Failed" if until else "Running"
    return Pod(
        name,
        name,
        "job",
        Stage.TRAIN,
        since,
        phase=phase,
        bound_at=since,
        started_at=since,
        finished_at=until,
        index=index,
    )


def test_peers_that_an_earlier_version_counted_with_their_attempt_are_not_counted_again() -> None:
    first, peer = pod("first", START, END), pod("peer", START, END, 1)
    later = END + timedelta(minutes=1)
    after, lost = pod("after", later, None), pod("lost", later, later + timedelta(seconds=9), 1)
    attempt = AttemptStatus(
        execution_id="first",
        stage="train",
        pod="first",
        outcome="Failed",
        started_at=rfc3339(START),
        finished_at=rfc3339(END),
    )
    before = FineTuneJobStatus(attempts=[attempt], gpu_time=GpuTimeStatus(held_seconds=7200, summary="s"))
    held = count_held(before, (first, peer, after, lost), (), later + timedelta(minutes=2), finished=False)
    assert (held.seconds, {h.execution_id for h in held.holders}) == (9, {"after", "lost"})
    fresh = count_held(FineTuneJobStatus(attempts=[attempt]), (first, peer), (), END, finished=False)
    assert fresh.seconds == 3600, "nothing was counted before: the peer's hour is"
