"""Downloads of a large object that are refused or broken off at any place: each has a name, and the next one reads what is missing."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest

from finetune_api.failures import Reason
from finetune_api.results import FileRecord
from finetune_api.uris import S3Location
from finetune_trainer import s3_download, s3_transfer, waiting
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import StageError
from finetune_trainer.s3 import CLIENT_CONFIG, S3Store, connect
from finetune_trainer.waiting import wait_until_available
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.trainer_run import Pod
from tests.trainer.conftest import S3

MIB = 1 << 20
DATA = random.Random(2).randbytes(6 * MIB)
WHOLE = FileRecord(path="big", size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())
MIDDLE = 3 * MIB
FOREVER = -1
ABOUT_BIG = "(HEAD|GET) .*/big"
SPEC = {
    "model": {"uri": "hf://o/m"},
    "data": {"train": [{"uri": "s3://bucket/x"}]},
    "output": {"uri": "s3://bucket/out"},
}


@pytest.fixture(scope="module")
def bucket(s3: S3, tmp_path_factory: pytest.TempPathFactory) -> str:
    """With ``a/big``, sent in two parts."""
    name, folder = s3.new_bucket(), tmp_path_factory.mktemp("big")
    s3.write_secret(folder / "secret")
    (folder / "big").write_bytes(DATA)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3_transfer, "PART_BYTES", 5 * MIB)  # the least that S3 takes
        connect(S3Location(name, "a"), Credentials("output", "s", folder / "secret"), folder).upload_file(
            folder / "big", "big"
        )
    return name


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.s3_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("botocore.endpoint.time.sleep", lambda seconds: None)  # before its second try
    monkeypatch.setattr(s3_download, "CHUNK_BYTES", 100_000)
    monkeypatch.setattr(s3_download, "IDLE_ATTEMPTS", 2)


def opened(s3: S3, proxy: FaultProxy, bucket: str, folder: Path) -> S3Store:
    """A store whose credentials have worked."""
    s3.write_secret(folder / "secret", endpoint=proxy.endpoint)
    store = connect(S3Location(bucket, "a"), Credentials("output", "s", folder / "secret"), folder)
    assert [i.key for i in store.list()] == ["big"]
    return store


REFUSED = {
    "reset": (Fault("", reset_request_at=0), Reason.STORAGE_UNAVAILABLE),
    "500": (Fault("", status=500, code="InternalError"), Reason.STORAGE_UNAVAILABLE),
    "SlowDown": (Fault("", status=503, code="SlowDown"), Reason.STORAGE_UNAVAILABLE),
    "silent": (Fault("", silent=True), Reason.STORAGE_UNAVAILABLE),
    "full": (Fault("", status=507, code="InsufficientStorage"), Reason.STORAGE_FULL),
    "expired": (Fault("", status=400, code="ExpiredToken"), Reason.ACCESS_DENIED),
    "rotated": (Fault("", status=403, code="InvalidAccessKeyId"), Reason.ACCESS_DENIED),
    "wrong bytes": (Fault("", corrupt_answer=True), Reason.STORAGE_UNAVAILABLE),
}
PLACES = {
    "head": [],
    "size of the first part": [Fault(ABOUT_BIG, times=1)],
    "size of the last part": [Fault(ABOUT_BIG, times=2)],
    "first byte": [Fault(ABOUT_BIG, times=3)],
    "middle": [Fault(ABOUT_BIG, times=3), Fault(ABOUT_BIG, reset_answer_at=MIDDLE)],
}
"""What happens before the fault."""


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fault", REFUSED)
def test_a_download_that_stops_has_a_name_and_is_gone_on_with(
    s3: S3,
    s3_proxy: FaultProxy,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    place: str,
) -> None:
    if fault == "silent":
        monkeypatch.setitem(CLIENT_CONFIG, "read_timeout", 1)
        monkeypatch.setitem(CLIENT_CONFIG, "retries", {"total_max_attempts": 1})
        monkeypatch.setattr(s3_download, "IDLE_ATTEMPTS", 1)
    store = opened(s3, s3_proxy, bucket, tmp_path)
    wrong, reason = REFUSED[fault]
    where = "GET .*/big" if fault == "wrong bytes" else ABOUT_BIG
    s3_proxy.faults.script = [
        *(Fault(**vars(before)) for before in PLACES[place]),
        Fault(**{**vars(wrong), "where": where, "times": FOREVER}),
    ]
    moved: list[int] = []
    with pytest.raises(StageError) as info:
        store.download_file("big", tmp_path / "big", moved.append)
    assert info.value.reason is reason
    assert info.value.patience_seconds or info.value.consequence == "Wait", "waited for, not failed"
    assert sum(moved) == 0
    assert not (tmp_path / "big").exists()
    s3_proxy.faults.script.clear()
    s3_proxy.faults.bytes_given = 0
    assert store.download_file("big", tmp_path / "big", moved.append) == WHOLE
    assert (tmp_path / "big").read_bytes() == DATA
    assert sum(moved) == len(DATA)
    if place == "middle" and fault != "wrong bytes":
        assert s3_proxy.faults.bytes_given < len(DATA) - MIDDLE + 200_000, "what was there is not read again"


@pytest.mark.parametrize("place", PLACES)
def test_credentials_that_rotate_during_a_download_are_waited_for(
    s3: S3, s3_proxy: FaultProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The store itself refuses them: to HEAD with a bare 403."""
    store = opened(s3, s3_proxy, bucket, tmp_path)

    def rotate() -> None:
        s3.write_secret(tmp_path / "secret", key="forgotten", endpoint=s3_proxy.endpoint)

    # This request was signed with the old ones: it is lost, and botocore signs its second try anew.
    rotation = Fault(ABOUT_BIG, before=rotate, reset_request_at=0)
    s3_proxy.faults.script = [*(Fault(**vars(before)) for before in PLACES[place]), rotation]
    told: list[str] = []
    ctx = Pod(tmp_path / "pod").context(SPEC)

    def pause(seconds: float) -> None:
        assert ctx.reporter._waiting is not None
        told.append(ctx.reporter._waiting.message)
        s3.write_secret(tmp_path / "secret", endpoint=s3_proxy.endpoint)

    monkeypatch.setattr(waiting, "pause", pause)
    assert wait_until_available(ctx, lambda: store.download_file("big", tmp_path / "big")) == WHOLE
    assert len(told) == 1
    assert "taken for rotated" in told[0]
    assert (tmp_path / "big").read_bytes() == DATA


def test_credentials_that_are_refused_for_a_moment_do_not_leave_a_download_unchecked(
    s3: S3, s3_proxy: FaultProxy, bucket: str, tmp_path: Path
) -> None:
    """Without the parts' size nobody knows which bytes the ETag is of."""
    store = opened(s3, s3_proxy, bucket, tmp_path)
    s3_proxy.faults.script = [
        Fault("HEAD .*partNumber=1", status=403),
        Fault("GET .*/big", status=403, code="InvalidAccessKeyId"),
    ]
    with pytest.raises(StageError, match="taken for rotated"):
        store.download_file("big", tmp_path / "big")
    assert store.download_file("big", tmp_path / "big") == WHOLE


def test_a_download_goes_on_where_it_was_when_the_endpoint_comes_back(
    s3: S3, s3_proxy: FaultProxy, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened(s3, s3_proxy, bucket, tmp_path)
    tries: list[float] = []

    def pause(seconds: float) -> None:
        tries.append(seconds)
        if len(tries) == 3:
            s3_proxy.come_back()

    monkeypatch.setattr(waiting, "pause", pause)
    s3_proxy.faults.script = [Fault("GET .*/big", reset_answer_at=MIDDLE, before=s3_proxy.go_away)]
    s3_proxy.faults.bytes_given = 0
    ctx = Pod(tmp_path / "pod").context(SPEC)
    assert wait_until_available(ctx, lambda: store.download_file("big", tmp_path / "big")) == WHOLE
    assert len(tries) == 3
    assert len(DATA) <= s3_proxy.faults.bytes_given < len(DATA) + 200_000, "what was there is not read again"
    assert (tmp_path / "big").read_bytes() == DATA
