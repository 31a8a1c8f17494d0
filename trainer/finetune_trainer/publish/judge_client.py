"""Chat completions of any server that speaks OpenAI's protocol, asked with bounded patience."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import httpx
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential_jitter

from finetune_api.spec import Judge
from finetune_trainer import waiting
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import StageError
from finetune_trainer.publish.judge import Chat, JudgeError, PairRefused
from finetune_trainer.sources.web import PASSING

log = logging.getLogger(__name__)

KEY = "OPENAI_API_KEY"
ATTEMPTS = 8
"""For one question: one and a half minutes of pauses, and up to REQUEST_SECONDS each."""
REQUEST_SECONDS = 120.0
ALL_SECONDS = 1800.0
"""For all questions: a finished training waits no longer for a verdict."""
LONGEST_PAUSE = 60.0
MOST_BYTES = 4 << 20
OF_THE_TEXT = (400, 413, 422)
"""Too long, or filtered; or nothing that this server takes at all."""


class JudgeAway(JudgeError):
    """It may pass."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class JudgeClient:
    """Asks one judge. Use as a context manager."""

    def __init__(self, judge: Judge, credentials: Credentials, clock: Callable[[], float] = time.monotonic) -> None:
        self._url = f"{judge.endpoint_url.rstrip('/')}/chat/completions"
        self._model = judge.model
        self._credentials = credentials
        self._clock = clock
        self._end = clock() + ALL_SECONDS
        # The same question should get the same reply. Reasoning models refuse the setting: then it is left out.
        self._sampling: dict[str, Any] = {"temperature": 0}
        # No redirects: the key is for this address alone.
        self._http = httpx.Client(timeout=httpx.Timeout(REQUEST_SECONDS, connect=10.0), follow_redirects=False)

    def __enter__(self) -> JudgeClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def ask(self, messages: Chat) -> str:
        """The reply's text; empty where there is none.

        Raises:
            JudgeError: it refuses, or was away for as long as it is waited for.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(JudgeAway),
            wait=_pause,
            stop=stop_after_attempt(ATTEMPTS),
            before_sleep=lambda state: log.warning("waiting for the judge: %s", _failure(state)),
            sleep=lambda seconds: waiting.pause(seconds),
            reraise=True,
        )
        return retrying(self._once, messages)

    def _once(self, messages: Chat) -> str:
        if self._clock() >= self._end:
            raise JudgeError(f"it took more than {ALL_SECONDS / 60:g} minutes in all")
        try:
            key = self._credentials.require(KEY).get(KEY)
        except StageError as error:
            raise JudgeAway(error.message) from None
        if key is not None and not (key.isascii() and key.isprintable()):
            raise JudgeError(f"{KEY} in Secret {self._credentials.secret_name} has characters that no key has")
        try:
            status, phrase, headers, body = self._post(messages, key)
        except (httpx.RequestError, httpx.InvalidURL) as error:
            # Not chained, and without what the request held.
            text = str(error).replace(key, "…") if key else str(error)
            raise JudgeAway(f"{self._url} cannot be reached: {type(error).__name__}: {text}") from None
        if status == 400 and self._sampling:
            kept, self._sampling = self._sampling, {}
            try:
                return self._once(messages)
            except PairRefused:
                self._sampling = kept
                raise
        self._check(status, phrase, headers)
        return self._text(body)

    def _post(self, messages: Chat, key: str | None) -> tuple[int, str, httpx.Headers, bytes]:
        asked = {"model": self._model, "messages": messages, **self._sampling}
        headers = {"Authorization": f"Bearer {key}"} if key is not None else {}
        end = self._clock() + REQUEST_SECONDS
        body = bytearray()
        with self._http.stream("POST", self._url, json=asked, headers=headers) as response:
            for part in response.iter_bytes():
                body += part
                # httpx's timeout is for each part: a byte a second would never end.
                if len(body) > MOST_BYTES or self._clock() > end:
                    raise JudgeAway(
                        f"{self._url} sent {len(body):,} bytes in {REQUEST_SECONDS:g} s or more than {MOST_BYTES >> 20} MiB, and no end"
                    )
            return response.status_code, response.reason_phrase, response.headers, bytes(body)

    def _check(self, status: int, phrase: str, headers: httpx.Headers) -> None:
        """The body of an error may repeat the key: it is not told."""
        if status == 200:
            return
        answered = f"{self._url} answered {status} {phrase}".rstrip()
        if status in PASSING or status >= 500:
            raise JudgeAway(answered, _seconds(headers.get("Retry-After")))
        if status in (401, 403):
            secret = self._credentials.secret_name
            where = (
                f"{KEY} in Secret {secret}"
                if secret is not None
                else f"evaluation.judge.secretRef (a Secret with {KEY})"
            )
            raise JudgeError(f"{answered}: check {where}")
        if status in OF_THE_TEXT:
            raise PairRefused(
                f"{answered}, as to a text that is longer than its context, or a model that it does not have"
            )
        raise JudgeError(
            f"{answered}: check evaluation.judge.endpointURL, below which /chat/completions is asked, and evaluation.judge.model"
        )

    def _text(self, body: bytes) -> str:
        try:
            content = json.loads(body)["choices"][0]["message"].get("content")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise JudgeError(
                f"{self._url} answered with something that is no chat completion: check evaluation.judge.endpointURL"
            ) from None
        return content if isinstance(content, str) else ""


_backoff = wait_exponential_jitter(initial=1, max=30, jitter=1)


def _pause(state: RetryCallState) -> float:
    """As long as the judge asks for, else longer each time."""
    after = _failure(state).retry_after
    return _backoff(state) if after is None else min(after, LONGEST_PAUSE)


def _failure(state: RetryCallState) -> JudgeAway:
    error = state.outcome.exception() if state.outcome else None
    assert isinstance(error, JudgeAway)
    return error


def _seconds(header: str | None) -> float | None:
    """Of Retry-After, where it is a number (it may be a date)."""
    return float(header) if header is not None and header.isascii() and header.isdigit() else None
