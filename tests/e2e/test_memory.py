"""A real container that exceeds its memory: told apart, with the peak, and healed where the job allows it."""

from __future__ import annotations

import json

import pytest

from tests.e2e.stack import Space, condition, finished, is_true, rows, spec_for

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


def test_too_little_memory_fails_with_the_reason_and_grows_where_allowed(space: Space) -> None:
    data = space.put(rows(40))
    stingy = {"maxFailures": 0}
    space.apply("stingy", spec_for(data, compute={"memory": "300Mi"}, recovery=stingy))
    job = space.until("stingy", finished, 400, "finished")
    failed = condition(job, "Failed")
    assert failed["reason"] == "HostOutOfMemory", json.dumps(job["status"], indent=1)
    assert "compute.memory" in failed["message"]

    growing = {"maxFailures": 1, "outOfMemory": {"maxMemory": "4Gi"}}
    space.apply("growing", spec_for(data, compute={"memory": "300Mi"}, recovery=growing))
    job = space.until("growing", finished, 700, "finished")
    assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
    told = [r for r in job["status"]["recoveries"] if r["reason"] == "HostOutOfMemory"]
    assert told, json.dumps(job["status"], indent=1)
    assert "450Mi" in told[0]["message"]
