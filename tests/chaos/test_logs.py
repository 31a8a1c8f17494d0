"""Lines of container logs."""

from __future__ import annotations

import pytest

from tests.chaos.logs import parse


@pytest.mark.parametrize(("fraction", "seconds"), [(".333231234", 0.333231), (".33323", 0.33323), (".5", 0.5), ("", 0)])
def test_a_line_is_read_whatever_its_time_ends_with(fraction: str, seconds: float) -> None:
    line = parse(f"2026-11-27T13:05:44{fraction}Z stderr F INFO step 44/120  loss 6.2", "train", "pod", "uid")
    assert line.at == pytest.approx(1795784744 + seconds)
    assert line.step == 44
