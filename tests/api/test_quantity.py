"""Quantities are exact."""

from __future__ import annotations

from fractions import Fraction

import pytest

from finetune_api.quantity import bytes_quantity, grown_memory, human_bytes, parse_quantity


@pytest.mark.parametrize(
    ("text", "count"), [("24Gi", 24 * 2**30), ("1.5G", 1_500_000_000), ("500m", Fraction(1, 2)), ("7", 7)]
)
def test_a_quantity_is_read_exactly(text: str, count: int | Fraction) -> None:
    assert parse_quantity(text) == count


@pytest.mark.parametrize("text", ["lots", "", "1e3", "-1Gi"])
def test_what_is_no_quantity_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        parse_quantity(text)


def test_bytes_are_written_with_the_largest_unit_that_fits() -> None:
    assert [bytes_quantity(n) for n in (0, 1000, 1536, 3 * 2**29, 6 * 2**30)] == ["0", "1000", "1536", "1536Mi", "6Gi"]


def test_memory_grows_by_half_each_time_up_to_its_limit() -> None:
    assert [grown_memory("4Gi", "10Gi", k) for k in range(5)] == ["4Gi", "6Gi", "9Gi", "10Gi", "10Gi"]


def test_memory_without_a_limit_or_at_it_never_grows() -> None:
    assert grown_memory("4Gi", None, 3) == "4Gi"
    assert grown_memory("4Gi", "4096Mi", 3) == "4Gi"


def test_people_read_bytes_with_one_decimal() -> None:
    assert human_bytes(4_187_593_114) == "3.9 GiB"
    assert human_bytes(12) == "12 B"
