"""What alternating pairs of measurements say of a ratio."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Ratio:
    """Ours over theirs, of each pair."""

    median: float
    lowest: float
    highest: float
    lower_bound: float | None
    """With 95 % confidence the true median is no lower; None with fewer than five pairs."""
    upper_bound: float | None
    """Nor higher than this, with 95 % confidence."""

    def __str__(self) -> str:
        bounds = "" if self.lower_bound is None else f", 95 % bounds {self.lower_bound:.3f} and {self.upper_bound:.3f}"
        return f"{self.median:.3f} ({self.lowest:.3f} to {self.highest:.3f}{bounds})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """The ratio of measurements made in pairs, in their order."""
    found = sorted(a / b for a, b in zip(ours, theirs, strict=True))
    rank = bound_rank(len(found))
    return Ratio(
        statistics.median(found),
        found[0],
        found[-1],
        None if rank is None else found[rank],
        None if rank is None else found[-1 - rank],
    )


def bound_rank(count: int, confidence: float = CONFIDENCE) -> int | None:
    """Which of ``count`` sorted values (from 0) bounds the median of what they are drawn from, from one side; None if too few were drawn.

    The sign test's bound: whatever the distribution, the k-th smallest is above the median with probability P(Binomial(n, 1/2) < k)
    (Conover, Practical Nonparametric Statistics, 3.2). Five pairs are the fewest that give 95 %.
    """
    above, rank = 0.0, None
    for k in range(count):
        above += math.comb(count, k) / 2**count
        if above > 1 - confidence:
            break
        rank = k
    return rank


def alternating(pair: int, ways: Sequence[str]) -> list[str]:
    """The order within a pair: a drift of the machine favours no one."""
    return list(ways) if pair % 2 == 0 else list(reversed(ways))
