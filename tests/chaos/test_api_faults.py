"""A point at which something else than the operator breaks fails alone."""

from __future__ import annotations

from typing import Any

import pytest

from demo.target import DemoError
from tests.chaos.api_faults import ClusterFaults
from tests.operator.fault_sweep import Point
from tests.support.api_proxy import Fault


def test_what_kubectl_says_at_one_point_is_that_point_s_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise DemoError("`kubectl delete ftj …` failed: connection refused")

    monkeypatch.setattr(ClusterFaults, "_live", refused)
    nothing: Any = None
    outcome = object.__new__(ClusterFaults)._one(nothing, nothing, Point(next(iter(Fault)), 3))
    assert not outcome.passed
    assert outcome.problems == ["DemoError: `kubectl delete ftj …` failed: connection refused"]
