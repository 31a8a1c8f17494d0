"""What every seed must give."""

from __future__ import annotations

import pytest

from tests.chaos.schedule import POD_LOSSES, Kind, Moment, schedule

STEPS = 300


@pytest.mark.parametrize("seed", range(50))
def test_every_schedule_can_be_lived_through(seed: int) -> None:
    kills = schedule(seed, STEPS)
    assert len(kills) == 10
    in_training = [k for k in kills if isinstance(k.at, int)]
    assert {k.kind for k in in_training} == set(Kind) - {Kind.EVICT}, "every kind once while it trains"
    assert len(in_training) >= 6
    at = [k.at for k in in_training if isinstance(k.at, int)]
    assert at == sorted(at)
    assert 1 < min(at) <= max(at) < 0.9 * STEPS
    assert sum(k.kind is Kind.WORKER for k in kills) <= 2, "a supervisor starts its process again twice"
    losses = [k for k in kills if k.kind in POD_LOSSES and k.at not in (Moment.PREPARING, Moment.PUBLISHING)]
    assert len(losses) <= 4, "the Job controller waits twice as long after each"


def test_a_seed_gives_the_same_kills() -> None:
    assert schedule(7, STEPS) == schedule(7, STEPS) != schedule(8, STEPS)
