"""What a part that fails leaves, and when a run over fault points counts."""

from __future__ import annotations

import copy

import pytest

from tests.chaos.parts import Figures, Part, counts, run_parts, struck_well
from tests.chaos.run import INTERVAL, Struck
from tests.chaos.schedule import Kind
from tests.operator.fault_sweep import Outcome, Point, report
from tests.support.api_proxy import EventFault, Fault


def kills(figures: Figures) -> bool:
    figures["kills"] = 10
    return True


def breaks(figures: Figures) -> bool:
    figures["begun"] = True
    raise AssertionError("the adapter differs")


def test_what_was_found_before_a_part_fails_is_written_and_the_parts_after_it_run() -> None:
    results: Figures = {"cpus": 2, "node_lost": {"seed": 6, "good": True}}
    written: list[tuple[str, Figures]] = []
    parts = [Part("killed-job", kills), Part("fault-points", breaks), Part("histories", kills)]
    assert not run_parts(parts, 7, results, lambda key: written.append((key, copy.deepcopy(results))))
    assert [key for key, _ in written] == ["killed_job", "fault_points", "histories"]
    first, second, third = (found for _, found in written)
    before = {"cpus": 2, "node_lost": {"seed": 6, "good": True}}
    assert first == {**before, "killed_job": {"seed": 7, "kills": 10, "good": True}}
    failed = second["fault_points"]
    assert (failed["begun"], failed["good"]) == (True, False)
    assert "the adapter differs" in failed["failure"]
    assert third["killed_job"] == first["killed_job"]
    assert third["histories"]["good"]


def test_a_part_that_ends_with_bad_figures_makes_the_whole_bad() -> None:
    bad = Part("node-lost", lambda _: False)
    assert run_parts([Part("killed-job", kills)], 7, {}, lambda _: None)
    assert not run_parts([bad, Part("killed-job", kills)], 7, {}, lambda _: None)


@pytest.mark.parametrize(
    ("points", "passed", "failed", "good"),
    [(10, 10, 0, True), (10, 9, 0, True), (10, 8, 0, False), (10, 9, 1, False), (10, 0, 0, False), (0, 0, 0, False)],
)
def test_points_that_were_not_reached_are_no_success(points: int, passed: int, failed: int, good: bool) -> None:
    assert struck_well(points, passed, failed) is good


def test_a_sweep_s_report_is_counted_over_all_kinds_of_faults() -> None:
    first, second = next(iter(Fault)), next(iter(EventFault))
    outcomes = [
        Outcome(Point(first, 1), hit="GET jobs"),
        Outcome(Point(first, 2), hit="GET pods", problems=["two executions"]),
        Outcome(Point(second, 1), hit="ADDED"),
        Outcome(Point(second, 2)),
    ]
    said = report(outcomes, seed=1, seconds=2)
    assert counts(said) == {"points": 4, "passed": 2, "failed": 1, "not_reached": 1}
    assert counts("a traceback") == {"points": 0, "passed": 0, "failed": 0, "not_reached": 0}


@pytest.mark.parametrize(
    ("phase", "step", "checkpoint", "counted"),
    [
        ("Training", INTERVAL + 5, INTERVAL, True),
        ("Training", INTERVAL - 2, 1, False),
        ("Training", INTERVAL + 1, 1, False),
        ("Publishing", 3 * INTERVAL, 3 * INTERVAL, False),
    ],
)
def test_a_kill_counts_as_one_while_training_once_a_checkpoint_was_due_by_its_interval(
    phase: str, step: int, checkpoint: int, counted: bool
) -> None:
    assert Struck(Kind.FORCE, phase, step, checkpoint).while_training is counted
