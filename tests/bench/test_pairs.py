"""What the benchmarks' ratios and bounds claim."""

from __future__ import annotations

import random

import pytest

from bench.pairs import alternating, bound_rank, ratio


@pytest.mark.parametrize(
    ("count", "rank"), [(0, None), (1, None), (4, None), (5, 0), (7, 0), (8, 1), (10, 1), (11, 2), (20, 5)]
)
def test_the_bounds_rank_is_the_sign_tests(count: int, rank: int | None) -> None:
    assert bound_rank(count) == rank


@pytest.mark.parametrize("count", [5, 8, 11])
def test_the_bound_is_above_the_true_median_in_one_of_twenty_series_at_most(count: int) -> None:
    draw = random.Random(1)
    series = [sorted(draw.lognormvariate(0, 1) for _ in range(count)) for _ in range(4000)]
    rank = bound_rank(count)
    assert rank is not None
    above = sum(values[rank] > 1 for values in series) / len(series)  # the median of this distribution is 1
    assert above <= 0.05 + 0.011  # three standard errors


def test_a_ratio_is_of_pairs_not_of_medians() -> None:
    found = ratio([2.0, 30.0, 2.0, 3.0, 2.0], [1.0, 10.0, 2.0, 2.0, 4.0])
    assert (found.median, found.lowest, found.highest) == (1.5, 0.5, 3.0)
    assert (found.lower_bound, found.upper_bound) == (0.5, 3.0)
    assert "95 %" in str(found)


def test_four_pairs_give_no_bound() -> None:
    found = ratio([1.0] * 4, [1.0] * 4)
    assert found.lower_bound is None
    assert str(found) == "1.000 (1.000 to 1.000)"


def test_every_other_pair_begins_with_the_other() -> None:
    assert [alternating(n, ["a", "b"]) for n in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]
