"""The pods of a finished Job are read from the API server before they count as gone, and each Job's once."""

from __future__ import annotations

from typing import Any, cast

import pytest

from finetune_operator.cache import Cache
from finetune_operator.client import Api
from finetune_operator.fresh_pods import FreshPods
from finetune_operator.planning import PlannerConfig
from finetune_operator.planning.outcome import untold_end
from tests.operator.world import World, world

GRACE = PlannerConfig().report_grace_seconds


class Lists:
    """An API server without pods."""

    def __init__(self) -> None:
        self.selectors: list[str] = []

    async def list_all(self, _: str, selector: str) -> tuple[list[Any], int]:
        self.selectors.append(selector)
        return [], 1


@pytest.mark.parametrize("code", [0, 11])
async def test_of_a_job_whose_pods_are_gone_one_list_is_made(code: int) -> None:
    w = world()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(code)
    assert untold_end(w.observe(), PlannerConfig()) is None
    w.drop_pods()
    assert untold_end(w.observe(), PlannerConfig()) is None, "they may come"
    w.tick(GRACE)
    observed = w.observe()
    job = untold_end(observed, PlannerConfig())
    assert job is not None
    api = Lists()
    fresh = FreshPods(cast(Api, api), Cache())
    for _ in range(2):
        await fresh.read(observed.job, job)
    assert api.selectors == [f"finetune.dev/job-uid={observed.job.uid}"]
    fresh.forget(observed.job.uid)
    await fresh.read(observed.job, job)
    assert len(api.selectors) == 2


def test_of_a_finetunejob_that_is_over_or_goes_nothing_is_read() -> None:
    w = failed_long_ago()
    assert untold_end(w.observe(), PlannerConfig()) is not None
    w.deleting = True
    assert untold_end(w.observe(), PlannerConfig()) is None
    w.deleting = False
    w.settle()
    assert untold_end(w.observe(), PlannerConfig()) is None


def failed_long_ago() -> World:
    w = world()
    w.settle()
    w.start_pod()
    w.run_pod()
    w.end_pod(11)
    w.drop_pods()
    w.tick(3600)
    return w
