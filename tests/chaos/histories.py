"""Random histories of the planner, as many as asked for, from one seed."""

from __future__ import annotations

from hypothesis import HealthCheck, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.operator.test_planner_properties import Histories


def run_histories(number: int, count: int) -> None:
    """``count`` histories of 40 events each, every invariant looked at after each event.

    Raises:
        AssertionError: with the shortest history that breaks one.
    """
    run_state_machine_as_test(
        seed(number)(Histories),
        settings=settings(
            max_examples=count,
            stateful_step_count=40,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
