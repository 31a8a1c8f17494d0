"""Progress posts to the operator. Reporting never raises, never blocks a stage and never decides anything."""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import httpx
from pydantic import ValidationError

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.progress import ProgressPost, StageReport, Transfer, Waiting
from finetune_trainer import heartbeat
from finetune_trainer.text import readable, shorten

log = logging.getLogger(__name__)

POST_INTERVAL_SECONDS = 2.0
MAX_BACKOFF_SECONDS = 30.0
TIMEOUT = httpx.Timeout(5.0, connect=3.0)
FINAL_ATTEMPTS = 3
WAITING_AGAIN_SECONDS = 30.0
"""How often an unchanged wait is said again: an operator that was killed after it had acknowledged a post has forgotten it."""
LEAST_ADVANCE = 10_000
"""Bytes a second since the last advance that make another one: a store that gives a byte now and then is waited for as one that
gives none, and does not hold a GPU for ever."""

TransferKind = Literal["download", "upload", "merge"]


class Reporter:
    """Posts what changed, at most once in two seconds, from a background thread; later values replace earlier ones.

    Values that could not be delivered stay pending. Token and CA are read anew for every post, because both rotate.
    Without a URL nothing is posted.
    """

    def __init__(
        self,
        stage: Stage,
        execution_id: str,
        *,
        url: str | None = None,
        token_file: Path | None = None,
        ca_file: Path | None = None,
        interval_seconds: float = POST_INTERVAL_SECONDS,
    ) -> None:
        self._stage = stage
        self._execution_id = execution_id
        self._url = f"{url.rstrip('/')}/progress" if url else None
        self._token_file = token_file
        self._ca_file = ca_file
        self._interval = interval_seconds
        self._changed = threading.Condition()
        self._pending: dict[str, object] = {}
        self._dirty = False
        self._waiting: Waiting | None = None
        self._waiting_said = 0.0
        self._farthest: dict[str, int] = {}
        self._advanced = time.monotonic()
        self._sequence = 0
        self._closed = False
        self._thread: threading.Thread | None = None
        self._sending = threading.Lock()

    def report(self, **fields: object) -> None:
        """Fields of :class:`ProgressPost` that have new values."""
        heartbeat.beat()
        with self._changed:
            self._pending.update(fields)
            self._wake()

    def set_waiting(self, reason: Reason, message: str) -> None:
        """Every post says from now on that the stage waits. Called at every try, it is said again every 30 seconds."""
        heartbeat.beat()
        waiting = Waiting(reason=reason, message=shorten(readable(message), 1024))
        now = time.monotonic()
        with self._changed:
            if waiting != self._waiting or now - self._waiting_said >= WAITING_AGAIN_SECONDS:
                self._waiting, self._waiting_said = waiting, now
                self._wake()

    def clear_waiting(self) -> None:
        """The wait is over."""
        with self._changed:
            if self._waiting is not None:
                self._waiting = None
                self._wake()

    @contextmanager
    def waiting(self, reason: Reason, message: str) -> Iterator[None]:
        """Waiting, for as long as the block runs."""
        self.set_waiting(reason, message)
        try:
            yield
        finally:
            self.clear_waiting()

    def transfer(self, kind: TransferKind, total_bytes: int | None = None) -> Callable[[int], None]:
        """A function that is told of every ``n`` bytes moved (negative where bytes must be moved again). Safe in threads."""
        lock = threading.Lock()
        completed = 0

        def moved(count: int) -> None:
            nonlocal completed
            with lock:
                completed = max(0, completed + count)
                now = time.monotonic()
                farther = completed - self._farthest.get(kind, 0)
                if farther > 0 and farther >= LEAST_ADVANCE * (now - self._advanced):
                    self._farthest[kind], self._advanced = completed, now
                # A count above the announced total would only confuse: then the total was wrong.
                total = None if total_bytes is None else max(total_bytes, completed)
                self.report(**{kind: Transfer(completed_bytes=completed, total_bytes=total)})

        return moved

    def measure_anew(self) -> None:
        """An effort begins: what earlier ones moved says nothing about it."""
        self._farthest, self._advanced = {}, time.monotonic()

    @property
    def advanced(self) -> float:
        """When (``time.monotonic()``) this effort last got farther than ever before. Bytes moved again are no advance: a store
        that breaks at the same place each time would else be waited for for ever."""
        return self._advanced

    def final(self, report: StageReport, *, attempts: int = FINAL_ATTEMPTS) -> bool:
        """Deliver the outcome now; True if it was acknowledged. The termination message carries it in any case."""
        with self._changed:
            self._closed = True
            self._waiting = None
            self._changed.notify_all()
        if self._url is None:
            return False
        if self._thread is not None:
            self._thread.join(timeout=TIMEOUT.read)
        for attempt in range(attempts):
            if attempt:
                time.sleep(0.5 * 2**attempt)
            if self._send({"final": report}):
                return True
        return False

    def flush(self) -> None:
        """Post what is pending now, once, and nothing more: another process of this pod tells the end."""
        with self._changed:
            self._closed = True
            dirty = self._dirty
            self._changed.notify_all()
        if self._url is None:
            return
        if self._thread is not None:
            self._thread.join(timeout=TIMEOUT.read)
        if dirty:
            self._send({})

    def _wake(self) -> None:
        """Called with the condition held."""
        self._dirty = True
        if self._url is None or self._closed:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _run(self) -> None:
        failures = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._dirty or self._closed)
                if self._closed:
                    return
            failures = 0 if self._send({}) else failures + 1
            pause = min(self._interval * 2**failures, MAX_BACKOFF_SECONDS) if failures else self._interval
            with self._changed:
                if self._changed.wait_for(lambda: self._closed, timeout=pause):
                    return

    def _send(self, extra: dict[str, object]) -> bool:
        with self._sending:
            with self._changed:
                fields, self._pending = self._pending, {}
                self._dirty = False
                waiting = self._waiting
                # In milliseconds, so that it grows over processes of the same pod too.
                self._sequence = max(self._sequence + 1, int(1000 * time.time()))
                sequence = self._sequence
            identity = {
                "execution_id": self._execution_id,
                "stage": self._stage,
                "sequence": sequence,
                "waiting": waiting,
            }
            try:
                post = ProgressPost.model_validate({**fields, **extra, **identity})
            except ValidationError as error:
                log.warning("progress that is not in the vocabulary is left out: %s", error)
                post = ProgressPost.model_validate({**extra, **identity})
            try:
                self._post(post)
            except Exception as error:  # noqa: BLE001 - reporting must never stop a stage, whatever goes wrong
                log.debug("progress post failed: %s: %s", type(error).__name__, error)
                with self._changed:
                    self._pending = {**fields, **self._pending}
                    self._dirty = True
                return False
            return True

    def _post(self, post: ProgressPost) -> None:
        assert self._url is not None
        headers = {"Content-Type": "application/json"}
        if self._token_file is not None and self._token_file.exists():
            headers["Authorization"] = f"Bearer {self._token_file.read_text().strip()}"
        verify: ssl.SSLContext | bool = True
        if self._url.startswith("https:") and self._ca_file is not None and self._ca_file.exists():
            verify = ssl.create_default_context(cafile=str(self._ca_file))
        # The operator is in the cluster: never through the proxy that the environment may name.
        with httpx.Client(verify=verify, timeout=TIMEOUT, trust_env=False) as client:
            client.post(
                self._url, content=post.model_dump_json(by_alias=True, exclude_none=True), headers=headers
            ).raise_for_status()
