"""What ``make demo-down`` removes from an existing cluster."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from demo import __main__ as demo
from demo.target import CRDS, RELEASE, SYSTEM_NAMESPACE, DemoError


def test_a_crd_that_an_earlier_version_did_not_install_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    there, missing = CRDS
    deleted: list[str] = []

    def kubectl(verb: str, *arguments: str) -> str:
        if missing in arguments:
            raise DemoError(f'error: the server doesn\'t have a resource type "{missing}"')
        if (verb, *arguments[:1]) == ("delete", "crd"):
            deleted.append(arguments[1])
        return ""

    target = SimpleNamespace(kubectl=kubectl, helm=lambda *_: "", exists=lambda _, name: name == there)
    monkeypatch.setattr(demo, "existing_target", lambda: target)
    monkeypatch.setattr(demo.install, "crd_owner", lambda _: (SYSTEM_NAMESPACE, RELEASE))
    demo.down()
    assert deleted == [there]
