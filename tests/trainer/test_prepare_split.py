"""The held-out split never puts a prompt on both sides."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.split import copies, group_of, held_out_rows

GROUPS = st.lists(st.integers(0, 12), min_size=2, max_size=80).filter(lambda groups: len(set(groups)) > 1)


@given(GROUPS, st.floats(0.01, 0.5), st.integers(0, 9))
def test_groups_stay_whole_both_sides_have_rows_and_the_seed_decides(
    groups: list[int], fraction: float, seed: int
) -> None:
    array = np.array(groups, np.uint64)
    held = held_out_rows(array, fraction, seed)
    assert 0 < held.sum() < len(groups)
    assert not set(array[held]) & set(array[~held])
    assert (held == held_out_rows(array, fraction, seed)).all()
    smallest = min(np.unique(array, return_counts=True)[1])
    assert held.sum() <= max(round(fraction * len(groups)), 1, smallest)


@given(GROUPS, st.integers(0, 5))
def test_which_groups_are_held_out_does_not_depend_on_the_order_of_rows(groups: list[int], seed: int) -> None:
    array = np.array(groups, np.uint64)
    held = held_out_rows(array, 0.3, seed)
    turned = held_out_rows(array[::-1].copy(), 0.3, seed)
    assert (held == turned[::-1]).all()


def test_distinct_prompts_are_held_out_in_exactly_the_share_asked_for() -> None:
    held = held_out_rows(np.arange(1000, dtype=np.uint64), 0.1, 42)
    assert held.sum() == 100
    assert (held != held_out_rows(np.arange(1000, dtype=np.uint64), 0.1, 43)).any()


@pytest.mark.parametrize("groups", [[], [1], [7, 7, 7]])
def test_fewer_than_two_prompts_are_too_few_rows(groups: list[int]) -> None:
    with pytest.raises(StageError) as info:
        held_out_rows(np.array(groups, np.uint64), 0.1, 0)
    assert info.value.reason is Reason.TOO_FEW_ROWS


@pytest.mark.parametrize("other", ["what  is\nKubernetes?", " What is Kubernetes? ", "What is Ｋubernetes?"])
def test_prompts_that_differ_in_case_space_or_unicode_form_are_one_group(other: str) -> None:
    assert group_of("What is Kubernetes?") == group_of(other)
    assert group_of("What is Kubernetes?") != group_of("What is Docker?")


def test_a_weight_is_how_often_rows_stand_there_on_average_and_the_seed_decides_which() -> None:
    assert {copies(None, 1, row) for row in range(100)} == {copies(1.0, 1, row) for row in range(100)} == {1}
    assert {copies(3.0, 1, row) for row in range(100)} == {3}
    halves = [copies(2.5, 1, row) for row in range(10_000)]
    assert set(halves) == {2, 3}
    assert abs(sum(halves) - 25_000) < 200  # four standard deviations
    assert halves == [copies(2.5, 1, row) for row in range(10_000)]
    assert halves != [copies(2.5, 2, row) for row in range(10_000)]
