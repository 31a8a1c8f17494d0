"""A fault at any request or watch event of a job's life changes nothing about its end.

A sample of the points, spread over all kinds; ``python -m tests.operator.fault_sweep --all`` (``make chaos``) runs every one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_cluster.light import LightCluster
from tests.operator.fault_sweep import COMBINED, ELECTED, Outcome, Point, Record, Sweep, good, report, sample
from tests.operator.harness import Tls
from tests.support.api_proxy import EventFault, Fault

SEED = 6
POINTS = 2 * (len(Fault) + len(EventFault))


def test_a_sweep_that_struck_nothing_is_no_success() -> None:
    point = Point(Fault.DROP, 1)
    assert good([Outcome(point, hit="GET /x"), Outcome(point)])
    assert not good([Outcome(point)])
    assert not good([Outcome(point, hit="GET /x"), Outcome(point, problems=["late"])])
    assert not good([])


def test_a_sweep_that_was_cut_off_goes_on_with_the_points_that_are_left(tmp_path: Path) -> None:
    points = [Point(Fault.DROP, 1), Point(Fault.DROP, 2, ELECTED), Point(EventFault.SWAP, 1)]
    file = tmp_path / "record"
    done = [Outcome(points[0], "GET /x", ["late"], 1, 2.5), Outcome(points[2])]
    first = Record(file)
    assert first.left(points) == points
    for outcome in done:
        first.add(outcome)
    again = Record(file)
    assert again.outcomes == done
    assert again.left(points) == [points[1]]


@pytest.mark.light
@pytest.mark.timeout(240)
def test_a_sample_of_all_fault_points_passes(cluster: LightCluster, tls: Tls, tmp_path: Path) -> None:
    with Sweep(cluster, tls, tmp_path, "sample") as sweep:
        for story, life in sweep.measure().items():
            # Lists and watches of three kinds, a snapshot, Jobs, statuses and Events; a Lease made, and looked at and renewed.
            assert life.requests >= {ELECTED: 4, COMBINED: 10}.get(story, 20)
        chosen = sample(sweep.points(), POINTS, SEED)
        outcomes = list(sweep.run_all(chosen))
        said = report(outcomes, SEED, sum(o.seconds for o in outcomes))
        assert not any(o.problems for o in outcomes), said
        # The last requests of a run are Events and lists, which a slower or faster run may not reach.
        assert sum(o.passed for o in outcomes) >= POINTS * 0.8, said
