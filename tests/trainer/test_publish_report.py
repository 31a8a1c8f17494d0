"""The report's charts and texts, whatever the numbers and answers are."""

from __future__ import annotations

import itertools
import math
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.results import ExecutionRecord
from finetune_trainer.publish.chart import (
    BOTTOM,
    HEIGHT,
    LARGEST,
    LEFT,
    MOST_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    line_chart,
    number,
    thinned,
    ticks,
)
from finetune_trainer.publish.report import SMOOTHED_STEPS, charts, duration, read_curves, size, smoothed, stage_seconds

FINITE = st.floats(-1e9, 1e9)


@given(low=FINITE, width=st.floats(1e-6, 1e9))
def test_ticks_are_few_and_evenly_spaced_within_the_range(low: float, width: float) -> None:
    high = low + width
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), 1)
    assert 1 <= len(found) <= 8
    assert all(low - slack <= tick <= high + slack for tick in found)
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert all(step == pytest.approx(steps[0], rel=1e-3, abs=slack) for step in steps)


def test_ticks_are_round() -> None:
    assert ticks(0, 100) == [0, 20, 40, 60, 80, 100]
    assert ticks(1.31, 2.74) == [1.5, 2.0, 2.5]
    assert ticks(3, 3) == [3]


@given(points=st.lists(st.tuples(FINITE, st.floats()), max_size=40))
def test_every_chart_is_well_formed_and_within_its_frame(points: list[tuple[float, float]]) -> None:
    svg = line_chart("a < b & c", [Series('x"y', points, dots=True)])
    kept = [p for p in points if math.isfinite(p[1]) and abs(p[1]) <= LARGEST]
    assert bool(svg) == bool(kept)
    if svg:
        drawn = ElementTree.fromstring(svg).findall("circle")
        assert len(drawn) == len(kept)
        assert all(LEFT - 1 <= float(dot.get("cx", "0")) <= WIDTH - RIGHT + 1 for dot in drawn)
        assert all(TOP - 1 <= float(dot.get("cy", "0")) <= HEIGHT - BOTTOM + 1 for dot in drawn)


def test_a_long_run_is_drawn_with_means_and_its_last_point() -> None:
    points = [(float(step), 1.0 / (step + 1)) for step in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS
    assert kept[-1] == points[-1]
    assert len(line_chart("loss", [Series("loss", points)])) < 20_000


def test_means_begin_where_there_are_enough_steps() -> None:
    points = [(float(step), float(step)) for step in range(1, 31)]
    assert smoothed(points)[0] == (20.0, 10.5)
    assert smoothed(points)[-1] == (30.0, 20.5)
    assert len(smoothed(points)) == 30 - SMOOTHED_STEPS + 1


METRICS = b"""{"step": 0, "held_out_loss": 2.0}
{"step": 1, "loss": 1.9, "learning_rate": 0.0001, "grad_norm": NaN}
{"step": 2, "loss": 1.5, "learning_rate": 0.0002, "grad_norm": 0.5}
{"step": 2, "held_out_loss": 1.6, "token_accuracy": 0.5}
"""


def test_curves_are_read_by_step() -> None:
    curves = read_curves(METRICS)
    assert curves.held_out == [(0, 2.0), (2, 1.6)]
    assert curves.loss == [(1, 1.9), (2, 1.5)]
    drawn = charts(curves)
    assert curves.token_accuracy == [(2, 0.5)]
    assert set(drawn) == {"loss", "accuracy", "rate", "norm"}
    assert drawn["norm"].count("<circle") == 1, "a NaN is left out"
    assert charts(read_curves(b"")) == {}


def test_stages_last_until_the_next_begins() -> None:
    def execution(stage: str, at: str) -> ExecutionRecord:
        return ExecutionRecord(stage=stage, execution_id=at, started_at=f"2026-01-01T00:{at}+00:00")

    attempts = [execution("prepare", "00:00"), execution("train", "01:00"), execution("train", "09:00")]
    found = stage_seconds([*attempts, execution("publish", "11:00")], "2026-01-01T00:11:30+00:00")
    assert found == [("prepare", 60), ("train", 600), ("publish", 30)]
    assert stage_seconds([], "2026-01-01T00:11:30+00:00") == []


def test_numbers_are_written_for_people() -> None:
    assert (number(1200.0), number(0.05), number(2e-5)) == ("1,200", "0.05", "2e-05")
    assert (size(512), size(168 << 20), size(3 << 29)) == ("512 B", "168 MiB", "1.5 GiB")
    assert (duration(12.4), duration(250), duration(3725)) == ("12 s", "4 min 10 s", "1 h 02 min")
