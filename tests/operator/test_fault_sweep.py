"""A fault at any request or watch event of a job's life changes nothing about its end.

A sample of the points, spread over all kinds; ``python -m tests.operator.fault_sweep --all`` (``make chaos``) runs every one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_cluster.light import LightCluster
from tests.operator.fault_sweep import ELECTED, Outcome, Point, Sweep, good, report, sample
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


@pytest.mark.light
@pytest.mark.timeout(240)
def test_a_sample_of_all_fault_points_passes(cluster: LightCluster, tls: Tls, tmp_path: Path) -> None:
    with Sweep(cluster, tls, tmp_path, "sample") as sweep:
        for story, life in sweep.measure().items():
            # Lists and watches of three kinds, a snapshot, Jobs, statuses and Events; a Lease made, and looked at and renewed.
            assert life.requests >= (4 if story == ELECTED else 20)
        chosen = sample(sweep.points(), POINTS, SEED)
        outcomes = list(sweep.run_all(chosen))
        said = report(outcomes, SEED, sum(o.seconds for o in outcomes))
        assert not any(o.problems for o in outcomes), said
        # The last requests of a run are Events and lists, which a slower or faster run may not reach.
        assert sum(o.passed for o in outcomes) >= POINTS * 0.8, said
