"""Everything that botocore, urllib3 and the system raise has the reason that the failure table means."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import urllib3.exceptions as u
from botocore import exceptions as b
from botocore.parsers import ResponseParserError

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.reporter import LEAST_ADVANCE, Reporter
from finetune_trainer.s3_errors import TornAnswer, translate
from finetune_trainer.waiting import Patience

URL = "http://store"
AWAY = [
    b.ConnectionError(error="x"),
    b.EndpointConnectionError(endpoint_url=URL),
    b.ConnectTimeoutError(endpoint_url=URL),
    b.ReadTimeoutError(endpoint_url=URL),
    b.ConnectionClosedError(endpoint_url=URL),
    b.ProxyConnectionError(proxy_url=URL),
    b.SSLError(endpoint_url=URL, error="x"),
    b.HTTPClientError(error="x"),
    b.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    b.ResponseStreamingError(error="x"),
    TornAnswer(operation="GetObject"),
    ResponseParserError("x"),
    u.ProtocolError("x"),
    u.IncompleteRead(1, 2),
    u.DecodeError("x"),
    u.SSLError("x"),
    u.LocationParseError("x"),
    ConnectionResetError(104, "x"),
    BrokenPipeError(32, "x"),
    TimeoutError("x"),
]


@pytest.mark.parametrize("error", AWAY, ids=lambda e: f"{type(e).__module__.split('.')[0]}.{type(e).__name__}")
def test_what_breaks_on_the_way_is_an_unavailable_store(error: Exception) -> None:
    found = translate(error, "s3://bucket/key")
    assert isinstance(found, StageError)
    assert found.reason is Reason.STORAGE_UNAVAILABLE


@pytest.mark.parametrize(
    ("code", "status", "reason"),
    [
        ("SlowDown", 503, Reason.STORAGE_UNAVAILABLE),
        ("InternalError", 500, Reason.STORAGE_UNAVAILABLE),
        ("InternalError", 200, Reason.STORAGE_UNAVAILABLE),
        ("RequestTimeout", 400, Reason.STORAGE_UNAVAILABLE),
        ("RequestTimeTooSkewed", 403, Reason.STORAGE_UNAVAILABLE),
        ("BadDigest", 400, Reason.STORAGE_UNAVAILABLE),
        ("IncompleteBody", 400, Reason.STORAGE_UNAVAILABLE),
        ("429", 429, Reason.STORAGE_UNAVAILABLE),
        ("OperationAborted", 409, Reason.STORAGE_UNAVAILABLE),
        ("NotImplemented", 501, Reason.INVALID_CONFIG),
        ("QuotaExceeded", 403, Reason.STORAGE_FULL),
        ("InsufficientStorage", 507, Reason.STORAGE_FULL),
        ("XMinioStorageFull", 507, Reason.STORAGE_FULL),
        ("XMinioAdminBucketQuotaExceeded", 400, Reason.STORAGE_FULL),
        ("507", 507, Reason.STORAGE_FULL),
        ("AccessDenied", 403, Reason.ACCESS_DENIED),
        ("ExpiredToken", 400, Reason.ACCESS_DENIED),
        ("InvalidAccessKeyId", 403, Reason.ACCESS_DENIED),
        ("NoSuchBucket", 404, Reason.BUCKET_NOT_FOUND),
        ("404", 404, Reason.STORAGE_UNAVAILABLE),
        ("InvalidArgument", 400, Reason.UNKNOWN),
    ],
)
def test_what_a_store_answers_has_its_reason(code: str, status: int, reason: Reason) -> None:
    answer = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    found = translate(b.ClientError(answer, "PutObject"), "s3://bucket/key")  # type: ignore[arg-type]
    assert isinstance(found, StageError)
    assert found.reason is reason


def test_other_errors_of_botocore() -> None:
    missing = b.ClientError({"Error": {"Code": "NoSuchKey"}}, "GetObject")
    assert isinstance(translate(missing, "s3://b/k"), NotFound)
    for error, reason in (
        (b.NoCredentialsError(), Reason.ACCESS_DENIED),
        (b.PartialCredentialsError(provider="env", cred_var="x"), Reason.ACCESS_DENIED),
        (b.ParamValidationError(report="x"), Reason.INVALID_CONFIG),
    ):
        found = translate(error, "s3://b/k")
        assert isinstance(found, StageError)
        assert found.reason is reason


def test_a_byte_now_and_then_does_not_hold_a_gpu_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    reporter = Reporter(Stage.TRAIN, "x")
    reporter.measure_anew()
    moved = reporter.transfer("download")
    patience = Patience(600, lambda: reporter.advanced)
    for _ in range(59):
        now += 10
        moved(LEAST_ADVANCE // 2)
        assert not patience.spent(now, None)
    now += 60
    assert patience.spent(now, None)
    moved(LEAST_ADVANCE * 1000)
    assert not patience.spent(now + 1, None), "it goes on: patience begins anew"
