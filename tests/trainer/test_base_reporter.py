"""Progress posts: coalesced, authenticated, never in the stage's way."""

from __future__ import annotations

import json
import queue
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.progress import ProgressPost, StageReport
from finetune_trainer import reporter as module
from finetune_trainer.reporter import Reporter
from tests.support.tls import localhost_certificate

FINAL = StageReport(stage=Stage.PREPARE, succeeded=True, reason="Succeeded", message="done")


class Endpoint:
    """Takes posts; ``status`` is what it answers; ``hold`` keeps it from answering."""

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.posts: queue.Queue[tuple[str, str | None, ProgressPost]] = queue.Queue()
        self.status = 204
        self.open = threading.Event()
        self.open.set()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                endpoint.open.wait(10)
                post = ProgressPost.model_validate_json(body)
                status = endpoint.status  # before the test sees the post and may change it
                endpoint.posts.put((self.path, self.headers.get("Authorization"), post))
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            self.server.socket = tls.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.server.server_address[1]}"

    def next(self) -> ProgressPost:
        return self.posts.get(timeout=10)[2]


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    endpoint = Endpoint()
    yield endpoint
    endpoint.open.set()
    endpoint.server.shutdown()
    endpoint.server.server_close()


def reporter(endpoint: Endpoint, **more: Any) -> Reporter:
    return Reporter(Stage.TRAIN, "pod-1", url=endpoint.url, interval_seconds=0.01, **more)


def test_a_post_says_who_and_what_with_the_token_of_now(endpoint: Endpoint, tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("first\n")
    r = reporter(endpoint, token_file=token, ca_file=tmp_path / "ca.crt")
    r.report(step=1, total_steps=9, loss=0.5)
    path, authorization, post = endpoint.posts.get(timeout=10)
    assert (path, authorization) == ("/progress", "Bearer first")
    assert (post.execution_id, post.stage, post.step, post.total_steps, post.loss) == ("pod-1", "train", 1, 9, 0.5)
    token.write_text("second")
    r.report(step=2)
    _, authorization, later = endpoint.posts.get(timeout=10)
    assert authorization == "Bearer second"
    assert later.sequence > post.sequence
    assert (later.step, later.total_steps) == (2, None)


def test_what_comes_while_a_post_is_on_its_way_goes_out_as_one(endpoint: Endpoint) -> None:
    endpoint.open.clear()
    r = reporter(endpoint)
    r.report(step=0)
    for step in range(1, 1000):
        r.report(step=step, loss=1 / step)
    endpoint.open.set()
    seen = [endpoint.next()]
    while seen[-1].step != 999:
        seen.append(endpoint.next())
    assert len(seen) <= 3


def test_the_wait_is_in_every_post_until_it_is_over(endpoint: Endpoint) -> None:
    r = reporter(endpoint)
    with r.waiting(Reason.SECRET_MISSING, "no Secret x"):
        first = endpoint.next()
        r.report(activity="Downloading")
        second = endpoint.next()
    third = endpoint.next()
    assert first.waiting
    assert (first.waiting.reason, first.waiting.message) == (Reason.SECRET_MISSING, "no Secret x")
    assert second.waiting == first.waiting
    assert third.waiting is None


def test_a_wait_that_lasts_is_said_again_for_an_operator_that_forgot_it(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = reporter(endpoint)
    r.set_waiting(Reason.SECRET_MISSING, "no Secret x")
    first = endpoint.next()
    r.set_waiting(Reason.SECRET_MISSING, "no Secret x")  # the next try, a moment later
    r.report(step=1)
    assert endpoint.next().step == 1
    monkeypatch.setattr(module, "WAITING_AGAIN_SECONDS", 0.0)
    r.set_waiting(Reason.SECRET_MISSING, "no Secret x")
    again = endpoint.next()
    assert again.waiting == first.waiting
    assert again.sequence > first.sequence


def test_values_of_a_failed_post_are_sent_again(endpoint: Endpoint) -> None:
    endpoint.status = 500
    r = reporter(endpoint)
    r.report(step=1, loss=2.0)
    endpoint.next()
    endpoint.status = 204
    r.report(step=2)
    found = endpoint.next()
    while found.step != 2:
        found = endpoint.next()
    assert found.loss == 2.0


def test_bytes_are_summed_and_may_be_taken_back(endpoint: Endpoint) -> None:
    r = reporter(endpoint)
    moved = r.transfer("upload", 100)
    for count in (60, -20, 70):
        moved(count)
    post = endpoint.next()
    while post.upload is None or post.upload.completed_bytes != 110:
        post = endpoint.next()
    assert post.upload.total_bytes == 110


def test_the_final_report_is_acknowledged_with_what_was_pending(endpoint: Endpoint) -> None:
    r = Reporter(Stage.PREPARE, "pod-1", url=endpoint.url)
    r.report(step=3)
    assert r.final(FINAL)
    posts = [endpoint.posts.get_nowait()[2] for _ in range(endpoint.posts.qsize())]
    assert posts[-1].final == FINAL
    assert 3 in [post.step for post in posts]


def test_a_final_report_that_nobody_takes_is_tried_a_few_times_and_never_raises(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune_trainer.reporter.time.sleep", lambda seconds: None)
    endpoint.status = 503
    assert not reporter(endpoint).final(FINAL)
    assert endpoint.posts.qsize() == module.FINAL_ATTEMPTS


@pytest.mark.parametrize("url", [None, "http://127.0.0.1:9", "https://127.0.0.1:9", "not a url"])
def test_without_an_endpoint_a_stage_goes_on(url: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.reporter.time.sleep", lambda seconds: None)
    r = Reporter(Stage.PREPARE, "pod-1", url=url)
    r.report(step=1, nonsense=object())
    with r.waiting(Reason.STORAGE_UNAVAILABLE, "x" * 5000):
        r.report(step=2)
    assert not r.final(FINAL)


def test_posts_are_the_shared_vocabulary(endpoint: Endpoint) -> None:
    r = reporter(endpoint)
    r.report(tokens_per_second=5.5)
    assert json.loads(endpoint.next().model_dump_json(by_alias=True, exclude_none=True))["tokensPerSecond"] == 5.5


def test_the_operator_is_trusted_by_the_ca_of_now_and_by_no_other(tmp_path: Path) -> None:
    ca, tls = localhost_certificate(tmp_path / "own")
    other, _ = localhost_certificate(tmp_path / "other")
    endpoint = Endpoint(tls)
    mounted = tmp_path / "ca.crt"
    mounted.write_bytes(other.read_bytes())
    try:
        r = reporter(endpoint, ca_file=mounted)
        assert not r.final(FINAL, attempts=1)
        assert endpoint.posts.empty()
        mounted.write_bytes(ca.read_bytes())
        assert r.final(FINAL, attempts=1)
        assert endpoint.next().final == FINAL
    finally:
        endpoint.server.shutdown()
        endpoint.server.server_close()
