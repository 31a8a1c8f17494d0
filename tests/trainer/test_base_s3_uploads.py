"""Uploads that are broken off at any place: what is in the bucket in the end is whole, or it is not there."""

from __future__ import annotations

import hashlib
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from finetune_api.failures import Reason
from finetune_api.results import FileRecord
from finetune_api.uris import S3Location
from finetune_trainer import s3_transfer, waiting
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import StageError
from finetune_trainer.s3 import CLIENT_CONFIG, UPLOADS_DIR, S3Store, connect
from finetune_trainer.s3_transfer import Pace, TooSlow
from finetune_trainer.s3_upload_record import UploadRecord
from finetune_trainer.waiting import wait_until_available
from tests.support import seaweed
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.trainer_run import Pod
from tests.trainer.conftest import S3

MIB = 1 << 20
DATA = random.Random(1).randbytes(11 * MIB)
WHOLE = FileRecord(path="big", size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
FOREVER = -1
SPEC = {
    "model": {"uri": "hf://o/m"},
    "data": {"train": [{"uri": "s3://bucket/x"}]},
    "output": {"uri": "s3://bucket/out"},
}


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_transfer, "PART_BYTES", 5 * MIB)  # the least that S3 takes
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)  # before its second try


@pytest.fixture
def store(s3: S3, s3_proxy: FaultProxy, tmp_path: Path) -> S3Store:
    s3.write_secret(tmp_path / "secret", endpoint=s3_proxy.endpoint)
    return connect(S3Location(s3.new_bucket(), "a"), Credentials("output", "s", tmp_path / "secret"), tmp_path)


@pytest.fixture
def big(tmp_path: Path) -> Path:
    (tmp_path / "big").write_bytes(DATA)
    return tmp_path / "big"


def uploads_in(s3: S3, store: S3Store) -> list[str]:
    return [u["Key"] for u in s3.client.list_multipart_uploads(Bucket=store.location.bucket).get("Uploads", [])]


def parts_sent(proxy: FaultProxy) -> list[int]:
    return [
        int(path.split("partNumber=")[1].split("&")[0]) for _, path in proxy.faults.requests if "partNumber" in path
    ]


REFUSED = {
    "reset": (Fault("", reset_request_at=0), Reason.STORAGE_UNAVAILABLE),
    "500": (Fault("", status=500, code="InternalError"), Reason.STORAGE_UNAVAILABLE),
    "SlowDown": (Fault("", status=503, code="SlowDown"), Reason.STORAGE_UNAVAILABLE),
    "Retry-After": (Fault("", status=503, code="SlowDown", headers={"Retry-After": "1"}), Reason.STORAGE_UNAVAILABLE),
    "MinIO full": (Fault("", status=507, code="XMinioStorageFull"), Reason.STORAGE_FULL),
    "Ceph quota": (Fault("", status=403, code="QuotaExceeded"), Reason.STORAGE_FULL),
    "507": (Fault("", status=507), Reason.STORAGE_FULL),
    "expired": (Fault("", status=400, code="ExpiredToken"), Reason.ACCESS_DENIED),
    "rotated": (Fault("", status=403, code="InvalidAccessKeyId"), Reason.ACCESS_DENIED),
}
REQUESTS = {"create": "POST .*uploads", "second part": "PUT .*partNumber=2", "complete": "POST .*uploadId"}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("request_", REQUESTS)
def test_an_upload_that_stops_has_a_name_and_is_gone_on_with(
    store: S3Store, s3: S3, s3_proxy: FaultProxy, big: Path, fault: str, request_: str
) -> None:
    store.put_bytes("before", b"")  # these credentials have worked
    wrong, reason = REFUSED[fault]
    again = Fault(**{**vars(wrong), "where": REQUESTS[request_], "times": FOREVER})
    s3_proxy.faults.script = [again]
    moved: list[int] = []
    with pytest.raises(StageError) as info:
        store.upload_file(big, "big", moved.append)
    assert info.value.reason is reason
    assert info.value.patience_seconds or info.value.consequence == "Wait", "waited for, not failed"
    assert sum(moved) == 0
    assert not store.exists("big")
    before = set() if request_ == "create" else {1} if request_ == "second part" else {1, 2, 3}
    s3_proxy.faults.script.clear()
    s3_proxy.faults.requests.clear()
    assert store.upload_file(big, "big", moved.append) == WHOLE
    assert set(parts_sent(s3_proxy)) == {1, 2, 3} - before
    assert sum(moved) == len(DATA)
    assert store.get_bytes("big") == DATA
    assert uploads_in(s3, store) == []


@pytest.mark.parametrize("at", [0, 1, 100_000, 5 * MIB - 1])
def test_a_connection_that_breaks_within_a_part_leaves_nothing_half_written(
    store: S3Store, s3_proxy: FaultProxy, big: Path, at: int
) -> None:
    s3_proxy.faults.script = [Fault("PUT .*partNumber=2", reset_request_at=at)]
    assert store.upload_file(big, "big") == WHOLE, "botocore tries once more"
    assert store.get_bytes("big") == DATA


@pytest.mark.parametrize(
    "broken",
    [{"end_answer_at": at} for at in (0, 5, 60, 200)] + [{"reset_answer_at": at} for at in (0, 60)],
    ids=lambda broken: "-".join(f"{kind} {at}" for kind, at in broken.items()),
)
@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("request_", ["POST .*uploads", "PUT .*partNumber=2", "POST .*uploadId", "PUT .*/small"])
def test_a_lost_answer_costs_nothing(
    store: S3Store, s3: S3, s3_proxy: FaultProxy, big: Path, broken: dict[str, int], times: int, request_: str
) -> None:
    """Twice: botocore's own second try is lost too."""
    s3_proxy.faults.script = [Fault(where=request_, times=times, **broken)]  # type: ignore[arg-type]
    reasons = []
    for _ in range(3):
        try:
            assert store.upload_file(big, "big") == WHOLE
            store.put_bytes("small", b"abc")
            break
        except StageError as error:
            reasons.append(error.reason)
    assert set(reasons) <= {Reason.STORAGE_UNAVAILABLE}
    assert store.get_bytes("big") == DATA
    assert store.get_bytes("small") == b"abc"
    store.abort_orphans()  # uploads whose id never arrived
    assert uploads_in(s3, store) == []


@pytest.mark.parametrize("at", [17, 60, 200, 400])
@pytest.mark.parametrize("kind", ["end_answer_at", "reset_answer_at"])
def test_an_answer_that_breaks_off_is_not_taken_for_an_empty_one(
    store: S3Store, s3_proxy: FaultProxy, kind: str, at: int
) -> None:
    store.put_bytes("x", b"abc")
    for read in (lambda: [i.key for i in store.list()], lambda: store.get_bytes("x"), lambda: store.exists("x")):
        whole = read()
        s3_proxy.faults.script = [Fault(where="", times=FOREVER, **{kind: at})]  # type: ignore[arg-type]
        try:
            found = read()
        except StageError:
            found = whole
        s3_proxy.faults.script.clear()
        assert found == whole


def test_a_completed_upload_whose_answer_is_lost_is_recognised_by_its_etag(
    store: S3Store, s3_proxy: FaultProxy, big: Path
) -> None:
    lost = Fault("POST .*uploadId", times=1, reset_answer_at=0)
    s3_proxy.faults.script = [lost, Fault("POST .*uploadId", times=FOREVER, status=404, code="NoSuchUpload")]
    assert store.upload_file(big, "big") == WHOLE
    assert parts_sent(s3_proxy) == [1, 2, 3]


def test_a_completed_upload_is_recognised_by_the_next_call_too(store: S3Store, s3_proxy: FaultProxy, big: Path) -> None:
    s3_proxy.faults.script = [
        Fault("POST .*uploadId", times=2, reset_answer_at=0),
        Fault("HEAD", times=FOREVER, status=500),
    ]
    with pytest.raises(StageError):
        store.upload_file(big, "big")
    s3_proxy.faults.script = [Fault("POST .*uploadId", times=FOREVER, status=404, code="NoSuchUpload")]
    s3_proxy.faults.requests.clear()
    assert store.upload_file(big, "big") == WHOLE
    assert parts_sent(s3_proxy) == []


def test_another_file_is_not_continued(store: S3Store, s3: S3, s3_proxy: FaultProxy, big: Path) -> None:
    s3_proxy.faults.script = [Fault("PUT .*partNumber=3", times=2, status=500)]
    with pytest.raises(StageError):
        store.upload_file(big, "big")
    changed = DATA[::-1]
    big.write_bytes(changed)
    store.upload_file(big, "big")
    assert store.get_bytes("big") == changed
    assert uploads_in(s3, store) == []


def test_a_file_that_changes_while_it_is_sent_is_not_uploaded(store: S3Store, s3: S3, big: Path) -> None:
    with pytest.raises(StageError, match="changed while it was uploaded"):
        store.upload_file(big, "big", lambda count: os.utime(big, ns=(1, 1)))
    assert not store.exists("big")
    assert uploads_in(s3, store) == []


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_store_that_lists_no_parts_is_continued_by_our_own_note(
    store: S3Store, s3_proxy: FaultProxy, big: Path, status: int, code: str
) -> None:
    s3_proxy.faults.script = [Fault("PUT .*partNumber=3", times=2, status=500)]
    with pytest.raises(StageError):
        store.upload_file(big, "big")
    s3_proxy.faults.requests.clear()
    s3_proxy.faults.script = [Fault("GET .*uploadId", times=FOREVER, status=status, code=code)]
    assert store.upload_file(big, "big") == WHOLE
    assert parts_sent(s3_proxy) == [3]
    assert store.get_bytes("big") == DATA


def test_an_upload_that_somebody_aborted_is_begun_anew(store: S3Store, s3: S3, s3_proxy: FaultProxy, big: Path) -> None:
    def abort() -> None:
        for upload in s3.client.list_multipart_uploads(Bucket=store.location.bucket)["Uploads"]:
            s3.client.abort_multipart_upload(
                Bucket=store.location.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            )

    s3_proxy.faults.script = [Fault("PUT .*partNumber=2", before=abort)]
    moved: list[int] = []
    assert store.upload_file(big, "big", moved.append) == WHOLE
    assert sum(moved) == len(DATA)
    assert store.get_bytes("big") == DATA


def test_uploads_of_a_killed_execution_are_removed_and_no_others(
    store: S3Store, s3: S3, s3_proxy: FaultProxy, big: Path, tmp_path: Path
) -> None:
    bucket = store.location.bucket
    for key in ("a/adapter/x", "a/y", "ab/z", "other/a/x"):
        s3.client.create_multipart_upload(Bucket=bucket, Key=key)
    s3_proxy.faults.script = [Fault("PUT .*partNumber=3", times=2, status=500)]
    with pytest.raises(StageError):
        store.upload_file(big, "big")  # our own, that will be gone on with
    assert store.abort_orphans("adapter") == 1
    assert store.abort_orphans() == 1
    assert sorted(uploads_in(s3, store)) == ["a/big", "ab/z", "other/a/x"]
    later = connect(store.location, Credentials("output", "s", tmp_path / "secret"), tmp_path / "another pod")
    assert later.abort_orphans() == 1
    with pytest.raises(ValueError, match="not in a whole bucket"):
        connect(S3Location(bucket, ""), Credentials("output", "s", tmp_path / "secret"), tmp_path).abort_orphans()


@pytest.mark.parametrize(("status", "code"), [(403, "AccessDenied"), (501, "NotImplemented"), (400, "InvalidArgument")])
def test_a_store_that_does_not_tell_of_uploads_costs_a_warning(
    store: S3Store, s3_proxy: FaultProxy, caplog: pytest.LogCaptureFixture, status: int, code: str
) -> None:
    s3_proxy.faults.script = [Fault("GET .*uploads", times=FOREVER, status=status, code=code)]
    assert store.abort_orphans() == 0
    assert "may stay" in caplog.text


def test_credentials_that_rotate_during_an_upload_are_taken_up(
    store: S3Store, s3: S3, s3_proxy: FaultProxy, big: Path, tmp_path: Path
) -> None:
    s3.write_secret(tmp_path / "secret", key="nobody", endpoint=s3_proxy.endpoint)
    with pytest.raises(StageError) as info:
        store.upload_file(big, "big")
    assert info.value.patience_seconds is None, "never accepted: just wrong"
    s3.write_secret(tmp_path / "secret", endpoint=s3_proxy.endpoint)

    def rotate() -> None:
        s3.write_secret(
            tmp_path / "secret", key=seaweed.ACCESS_KEY, secret=seaweed.SECRET_KEY, endpoint=s3_proxy.endpoint
        )

    s3_proxy.faults.script = [Fault("PUT .*partNumber=2", before=rotate)]
    assert store.upload_file(big, "big") == WHOLE
    assert store.get_bytes("big") == DATA


def test_a_transfer_must_move_enough_in_each_stretch() -> None:
    now = 0.0
    pace = Pace(lambda: now)
    for _ in range(600):
        now += 1
        pace.moved(s3_transfer.SLOWEST_BYTES_PER_SECOND)
    for _ in range(59):
        now += 1
        pace.moved(1)
    now += 1
    with pytest.raises(TooSlow, match=r"60 bytes in 60 seconds"):
        pace.moved(1)


def test_a_store_that_trickles_is_given_up(
    store: S3Store, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("f", DATA[:MIB])
    monkeypatch.setattr(s3_transfer, "STALL_SECONDS", 0.3)
    s3_proxy.faults.script = [Fault("GET .*/f", times=FOREVER, trickle_seconds=0.05)]
    with pytest.raises(StageError, match="all but stands still") as info:
        store.download_file("f", tmp_path / "f")
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    s3_proxy.faults.script.clear()
    store.download_file("f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA[:MIB]


READS: dict[str, Callable[[S3Store], object]] = {
    "get": lambda store: store.get_bytes("f"),
    "range": lambda store: store.read_range("f", 100, 1000),
    "list": lambda store: list(store.list()),
    "bucket": lambda store: store.check_bucket(),
    "uploads": lambda store: store.abort_orphans(),
}


@pytest.mark.parametrize("read", READS)
def test_small_reads_of_a_store_that_trickles_are_given_up(
    store: S3Store, s3_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch, read: str
) -> None:
    store.put_bytes("f", DATA[:2000])
    monkeypatch.setattr(s3_transfer, "STALL_SECONDS", 0.3)
    s3_proxy.faults.script = [Fault("GET", times=FOREVER, trickle_seconds=0.05)]
    started = time.monotonic()
    with pytest.raises(StageError, match=r"all but stands still|no whole answer within") as info:
        READS[read](store)
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    assert time.monotonic() - started < 5, "single bytes would take 15 seconds and more"


def test_an_upload_that_is_taken_too_slowly_is_given_up_and_gone_on_with(
    s3: S3, s3_proxy: FaultProxy, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CLIENT_CONFIG, "retries", {"total_max_attempts": 1})
    monkeypatch.setattr(s3_transfer, "STALL_SECONDS", 1)
    monkeypatch.setattr(s3_transfer, "SLOWEST_BYTES_PER_SECOND", 1_000_000)
    s3.write_secret(tmp_path / "secret", endpoint=s3_proxy.endpoint)
    store = connect(S3Location(s3.new_bucket(), "a"), Credentials("output", "s", tmp_path / "secret"), tmp_path)
    s3_proxy.faults.script = [Fault("PUT .*partNumber=2", take_bytes_per_second=300_000)]
    with pytest.raises(StageError, match=r"bytes in \d seconds, expected 1,000,000 a second at least") as info:
        store.upload_file(big, "big")
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    monkeypatch.undo()
    monkeypatch.setattr(s3_transfer, "PART_BYTES", 5 * MIB)
    s3_proxy.faults.requests.clear()
    assert store.upload_file(big, "big") == WHOLE
    assert parts_sent(s3_proxy) == [2, 3]
    assert store.get_bytes("big") == DATA


def test_an_upload_goes_on_where_it_was_when_the_endpoint_comes_back(
    store: S3Store, s3_proxy: FaultProxy, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[float] = []

    def pause(seconds: float) -> None:
        tries.append(seconds)
        if len(tries) == 3:
            s3_proxy.come_back()

    monkeypatch.setattr(waiting, "pause", pause)
    sent_in_vain = 100_000
    s3_proxy.faults.script = [
        Fault("PUT .*partNumber=2", reset_request_at=sent_in_vain, before=s3_proxy.go_away),
    ]
    ctx = Pod(tmp_path / "pod").context(SPEC)
    assert wait_until_available(ctx, lambda: store.upload_file(big, "big")) == WHOLE
    assert len(tries) == 3
    assert parts_sent(s3_proxy) == [1, 2, 2, 3]
    assert len(DATA) < s3_proxy.faults.bytes_taken < len(DATA) + sent_in_vain + 1000, "and the list of parts"
    assert store.get_bytes("big") == DATA


PAGE = "<!doctype html><p>Please log in<br>"


@pytest.mark.parametrize(
    "status", [200, 203]
)  # botocore itself takes a page with 200, but with no other status, for an error
@pytest.mark.parametrize("request_", ["get", "list", "head", "put", "upload", "uploads"])
def test_a_page_is_not_taken_for_an_answer(
    store: S3Store, s3_proxy: FaultProxy, big: Path, request_: str, status: int
) -> None:
    calls: dict[str, Callable[[S3Store], object]] = {
        **READS,
        "head": lambda store: store.exists("f"),
        "put": lambda store: store.put_bytes("f", b"x"),
        "upload": lambda store: store.upload_file(big, "big"),
    }
    store.put_bytes("f", b"x")
    s3_proxy.faults.script = [Fault("", times=FOREVER, status=status, page=PAGE, headers={"Content-Type": "text/html"})]
    with pytest.raises(StageError) as info:
        calls[request_](store)
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE


@pytest.mark.parametrize("size", [100, len(DATA)], ids=["small", "big"])
def test_a_file_that_is_there_is_not_sent_again(
    store: S3Store, s3: S3, s3_proxy: FaultProxy, tmp_path: Path, size: int
) -> None:
    path, faults = tmp_path / "f", s3_proxy.faults
    path.write_bytes(DATA[:size])
    sent = store.upload_file(path, "f")

    def sends(data: bytes) -> bool:
        faults.bytes_taken, moved = 0, []
        record = store.upload_file(path, "f", moved.append)
        assert (record.size, record.sha256) == (len(data), hashlib.sha256(data).hexdigest())
        assert sum(moved) == len(data)
        assert store.get_bytes("f") == data
        return faults.bytes_taken >= len(data)

    assert not sends(DATA[:size])
    assert store.upload_file(path, "f") == sent
    assert UploadRecord.upload_ids(tmp_path / UPLOADS_DIR) == set(), "no upload that could be gone on with"
    path.write_bytes(DATA[-size:][::-1])
    os.utime(path, ns=(1, 1))
    assert sends(DATA[-size:][::-1]), "another file"
    assert not sends(DATA[-size:][::-1])
    s3.put(store.location.bucket, "a/f", b"x" * size)
    assert sends(DATA[-size:][::-1]), "somebody replaced the object"
    s3.client.delete_object(Bucket=store.location.bucket, Key="a/f")
    assert sends(DATA[-size:][::-1]), "somebody deleted the object"
    store.delete("f")
    assert list((tmp_path / UPLOADS_DIR).iterdir()) == [], "a note of what is deleted is of no use"


@pytest.mark.parametrize("request_", ["PUT .*partNumber=2", "POST .*uploadId", "PUT .*/small", "GET .*/small"])
def test_an_endpoint_that_takes_requests_and_never_answers_is_given_up(
    s3: S3, s3_proxy: FaultProxy, big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: str
) -> None:
    monkeypatch.setitem(CLIENT_CONFIG, "read_timeout", 1)
    s3.write_secret(tmp_path / "secret", endpoint=s3_proxy.endpoint)
    store = connect(S3Location(s3.new_bucket(), "a"), Credentials("output", "s", tmp_path / "secret"), tmp_path)

    def all_of_it() -> bytes:
        store.upload_file(big, "big")
        store.put_bytes("small", b"abc")
        return store.get_bytes("small")

    s3_proxy.faults.script = [Fault(request_, times=2, silent=True)]
    with pytest.raises(StageError) as info:
        all_of_it()
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    assert all_of_it() == b"abc"
    assert store.get_bytes("big") == DATA
