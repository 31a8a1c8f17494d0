"""The operator's clock may be wrong: what it decides by is the API server's."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest

from finetune_api.names import Stage
from finetune_cluster.steps import Pod, Step, run_forever
from finetune_operator.clock import ServerClock
from tests.operator.harness import Bench, OperatorProcess, condition, is_true, stage_of, succeed_stage
from tests.operator.manifests import finetunejob

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SKEWED = "tests.operator.skewed_operator"


def heard(clock: ServerClock, date: datetime, local: datetime, trip: float = 0.0) -> float:
    clock.heard(format_datetime(date, usegmt=True), local, local + timedelta(seconds=trip))
    return clock.offset.total_seconds()


def test_a_clock_that_is_right_is_left_alone() -> None:
    clock = ServerClock()
    for late in (0.0, 0.5, 0.999, 1.5):
        assert heard(clock, NOON, NOON + timedelta(seconds=late)) == 0


@pytest.mark.parametrize("skew", [-300, 300])
def test_a_wrong_clock_is_corrected_once_and_does_not_waver(skew: int) -> None:
    clock = ServerClock()
    first = heard(clock, NOON, NOON + timedelta(seconds=skew))
    assert first == pytest.approx(-skew, abs=1)
    for late in (0.2, 0.9, 1.4):
        assert heard(clock, NOON, NOON + timedelta(seconds=skew + late)) == first
    assert heard(clock, NOON, NOON) == 0, "somebody set it right"


def test_an_answer_that_took_long_says_little_about_the_time() -> None:
    assert heard(ServerClock(), NOON, NOON - timedelta(seconds=10), trip=11) == 0


def test_what_is_no_date_changes_nothing() -> None:
    clock = ServerClock()
    for text in (None, "", "yesterday"):
        clock.heard(text, NOON, NOON)
    assert clock.offset == timedelta()


def train_forever(pod: Pod) -> list[Step]:
    return run_forever() if stage_of(pod) is Stage.TRAIN else succeed_stage(pod)


@pytest.mark.light
def test_an_operator_five_minutes_fast_does_not_end_jobs_early(bench: Bench) -> None:
    bench.start_operator(module=SKEWED, CLOCK_SKEW_SECONDS="300")
    with bench.script(lambda pod: succeed_stage(pod, 1)):
        bench.apply(finetunejob("fast").deadline(120).pending_timeout(60).build())
        done = bench.until_finished("fast")
    assert is_true(done, "Complete"), done["status"]["message"]
    ended = datetime.fromisoformat(done["status"]["completionTime"])
    assert abs((datetime.now(UTC) - ended).total_seconds()) < 60


@pytest.mark.light
def test_an_operator_five_minutes_slow_keeps_a_deadline(bench: Bench) -> None:
    bench.start_operator(module=SKEWED, CLOCK_SKEW_SECONDS="-300")
    with bench.script(train_forever):
        bench.apply(finetunejob("slow").deadline(2).build())
        done = bench.until_finished("slow", 30)
    assert condition(done, "Failed")["reason"] == "DeadlineExceeded"


def roles(operators: list[OperatorProcess]) -> list[str]:
    return sorted(o.get("/readyz").text for o in operators)


@pytest.mark.light
def test_of_operators_whose_clocks_disagree_one_leads(bench: Bench) -> None:
    election: dict[str, Any] = {
        "FINETUNE_LEADER_ELECTION": "true",
        "FINETUNE_LEASE_DURATION_SECONDS": "4",
        "FINETUNE_LEASE_RENEW_DEADLINE_SECONDS": "3",
        "FINETUNE_LEASE_RETRY_SECONDS": "1",
    }
    operators = [bench.start_operator(module=SKEWED, CLOCK_SKEW_SECONDS=s, **election) for s in ("-300", "300", "0")]
    end = time.monotonic() + 30
    while roles(operators) != ["leader", "standby", "standby"]:
        assert time.monotonic() < end
    path = f"/apis/coordination.k8s.io/v1/namespaces/{bench.namespace}/leases"
    holder = bench.api.get(f"{path}/finetune-operator")["spec"]["holderIdentity"]
    renewals = 0
    for _, lease in bench.api.watch(path, 30):
        assert lease["spec"]["holderIdentity"] == holder
        assert roles(operators) == ["leader", "standby", "standby"]
        renewals += 1
        if renewals > 6:  # longer than a lease lasts
            break
    assert renewals > 6
