"""The client of the API server: a server that is starting is asked again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from finetune_cluster.api import Api, ApiError
from finetune_cluster.console import ClusterError

BUSY = httpx.Response(429, headers={"Retry-After": "0"}, json={"message": "storage is (re)initializing"})


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.setattr("ssl.create_default_context", lambda **_: True)
    cluster = {"server": "https://api.test", "certificate-authority-data": ""}
    config = {"clusters": [{"cluster": cluster}], "users": [{"user": {"token": "t"}}]}
    (tmp_path / "config").write_text(yaml.safe_dump(config))
    return Api(tmp_path / "config")


def answering(api: Api, *answers: httpx.Response) -> Iterator[httpx.Response]:
    left = iter(answers)
    api.http = httpx.Client(base_url=api.server, transport=httpx.MockTransport(lambda _: next(left)))
    return left


@pytest.mark.parametrize("method", ["get", "find", "create", "apply", "merge", "delete"])
def test_a_request_that_is_answered_429_is_sent_again(api: Api, method: str) -> None:
    left = answering(api, BUSY, BUSY, httpx.Response(200, json={"kind": "Thing"}))
    getattr(api, method)("/things", *([{}] if method in ("create", "apply", "merge") else []))
    assert next(left, None) is None


def test_any_other_refusal_is_told(api: Api) -> None:
    answering(api, httpx.Response(403, json={"message": "no"}))
    with pytest.raises(ApiError, match="403 no"):
        api.get("/things")


def test_a_watch_begins_anew_while_the_server_starts(api: Api) -> None:
    event = json.dumps({"type": "ADDED", "object": {"kind": "Thing"}})
    answering(api, BUSY, httpx.Response(503), httpx.Response(200, text=event), httpx.Response(403))
    events = api.watch("/things", 60)
    assert next(events) == ("ADDED", {"kind": "Thing"})
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        next(events)


def test_a_watch_that_ends_with_an_error_begins_anew_or_says_so(api: Api) -> None:
    gone = json.dumps({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}})
    event = json.dumps({"type": "ADDED", "object": {"kind": "Thing"}})
    answering(api, httpx.Response(200, text=gone), httpx.Response(200, text=event))
    assert next(api.watch("/things", 60)) == ("ADDED", {"kind": "Thing"})
    answering(api, httpx.Response(200, text=gone))
    with pytest.raises(ClusterError, match="too old"):
        next(api.watch("/things", 60, {"resourceVersion": "7"}))
