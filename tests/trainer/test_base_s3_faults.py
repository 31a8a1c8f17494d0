"""Transfers through a proxy that breaks what networks and stores break."""

from __future__ import annotations

import hashlib
import http.client
import random
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.results import FileRecord
from finetune_api.uris import S3Location
from finetune_trainer import s3_download, s3_transfer, waiting
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import StageError
from finetune_trainer.s3 import S3Store, connect
from finetune_trainer.s3_checksum import Hashes, Version, etag_is_md5
from finetune_trainer.s3_upload_record import UploadRecord
from finetune_trainer.waiting import wait_until_available
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.own_memory import anonymous_bytes
from tests.support.trainer_run import Pod
from tests.trainer.conftest import S3

DATA = random.Random(0).randbytes(3_000_000)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.s3_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr(s3_download, "CHUNK_BYTES", 100_000)


@pytest.fixture
def store(s3: S3, s3_proxy: FaultProxy, tmp_path: Path) -> S3Store:
    s3.write_secret(tmp_path / "secret", endpoint=s3_proxy.endpoint)
    return connect(S3Location(s3.new_bucket(), "a"), Credentials("output", "s", tmp_path / "secret"), tmp_path)


def test_a_download_goes_on_where_the_connection_broke(store: S3Store, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    sent = store.put_bytes("f", DATA)
    s3_proxy.faults.drop_after_bytes, s3_proxy.faults.drops = 1_000_000, 2
    moved: list[int] = []
    assert store.download_file("f", tmp_path / "f", moved.append) == sent
    assert (tmp_path / "f").read_bytes() == DATA
    assert sum(moved) == len(DATA)
    assert s3_proxy.faults.drops == 0


@pytest.mark.parametrize(
    ("kind", "error"), [("reset_answer_at", ConnectionResetError), ("end_answer_at", http.client.IncompleteRead)]
)
def test_the_proxy_resets_connections_and_ends_them(
    store: S3Store, s3_proxy: FaultProxy, kind: str, error: type[Exception]
) -> None:
    store.put_bytes("f", DATA)
    url = store._client.generate_presigned_url(
        "get_object", Params={"Bucket": store.location.bucket, "Key": f"{store.location.key}/f"}
    )
    s3_proxy.faults.script = [Fault(where="GET", **{kind: 1_000_000})]  # type: ignore[arg-type]
    with urllib.request.urlopen(url) as answer:
        assert len(answer.read(900_000)) == 900_000
        with pytest.raises(error):
            answer.read()


def test_a_download_that_never_gets_on_is_given_up_and_continued_by_the_next(
    store: S3Store, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    store.put_bytes("f", DATA)
    s3_proxy.faults.drop_after_bytes, s3_proxy.faults.drops = 1_500_000, 1
    original = store._client.get_object
    calls: list[str] = []

    def broken_later(**arguments: str) -> object:
        calls.append(arguments["Range"])
        if len(calls) > 1:
            s3_proxy.faults.unavailable = -1
        return original(**arguments)  # type: ignore[arg-type]

    store._client.get_object = broken_later  # type: ignore[method-assign,assignment]
    with pytest.raises(StageError, match=r"stopped at 1,\d\d\d,\d\d\d of 3,000,000 bytes") as info:
        store.download_file("f", tmp_path / "f")
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    s3_proxy.faults.unavailable = 0
    store._client.get_object = original  # type: ignore[method-assign]
    s3_proxy.faults.requests.clear()
    moved: list[int] = []
    store.download_file("f", tmp_path / "f", moved.append)
    assert (tmp_path / "f").read_bytes() == DATA
    assert sum(moved) == len(DATA)
    assert moved[0] >= 1_400_000, "what was there is counted, not read again"


def test_wrong_bytes_are_read_again(store: S3Store, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    store.put_bytes("f", DATA)
    s3_proxy.faults.corrupt = 1
    moved: list[int] = []
    store.download_file("f", tmp_path / "f", moved.append)
    assert (tmp_path / "f").read_bytes() == DATA
    assert sum(moved) == len(DATA)


@pytest.mark.parametrize("corrupt", [1, -1], ids=["once", "always"])
def test_wrong_bytes_of_an_object_in_parts_are_noticed(
    store: S3Store, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrupt: int
) -> None:
    monkeypatch.setattr(s3_transfer, "PART_BYTES", 5 << 20)  # the least that S3 takes
    (tmp_path / "big").write_bytes(DATA * 4)
    sent = store.upload_file(tmp_path / "big", "big")
    s3_proxy.faults.corrupt = corrupt
    if corrupt > 0:
        assert store.download_file("big", tmp_path / "back") == sent
        assert (tmp_path / "back").read_bytes() == DATA * 4
        return
    with pytest.raises(
        StageError, match=r"arrived twice .* MD5 over the parts' MD5s [0-9a-f]{32}, the store names [0-9a-f]{32}"
    ) as info:
        store.download_file("big", tmp_path / "back")
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("algorithm", ["SHA256", "CRC32"])
def test_a_checksum_of_the_whole_object_is_checked_where_the_etag_says_nothing(
    store: S3Store, s3: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algorithm: Any
) -> None:
    s3.client.put_object(Bucket=store.location.bucket, Key="a/f", Body=DATA, ChecksumAlgorithm=algorithm)
    monkeypatch.setattr("finetune_trainer.s3_checksum.etag_is_md5", lambda *_: False)
    store.download_file("f", tmp_path / "f")
    head = store._client.head_object

    def other(**arguments: Any) -> Any:
        return {**head(**arguments), f"Checksum{algorithm}": "AAAA"}

    monkeypatch.setattr(store._client, "head_object", other)
    with pytest.raises(StageError, match=f"{algorithm.replace('SHA', 'SHA-')} [0-9a-f]+, the store names 00"):
        store.download_file("f", tmp_path / "g")


@pytest.mark.parametrize(
    ("size", "parts"), [(0, None), (10, None), (10, 4), (12, 4), (3, 4), (8, 4), (1, 1)], ids=lambda v: str(v)
)
@pytest.mark.parametrize("cut", [1, 3, 4, 5, 100])
def test_the_etag_of_parts_does_not_depend_on_how_bytes_arrive(size: int, parts: int | None, cut: int) -> None:
    data = DATA[:size]
    hashes = Hashes(Version("", size, "some", parts))
    for start in range(0, size, cut):
        hashes.feed(data[start : start + cut])
    pieces = [hashlib.md5(data[i : i + parts]).digest() for i in range(0, size, parts)] if parts else []
    assert hashes.md5() == hashlib.md5(b"".join(pieces) if parts else data).hexdigest()


@pytest.mark.parametrize("head", [{"ServerSideEncryption": "aws:kms"}, {"SSECustomerAlgorithm": "AES256"}])
def test_the_etag_of_encrypted_objects_is_not_taken_for_an_md5(head: Any) -> None:
    assert not etag_is_md5(head, "bucket")
    assert not etag_is_md5({}, "bucket--use1-az4--x-s3")  # type: ignore[typeddict-item]
    assert etag_is_md5({"ServerSideEncryption": "AES256"}, "bucket")  # type: ignore[typeddict-item]


@pytest.mark.parametrize("status", [412, 416])
def test_a_store_that_never_serves_the_version_it_announces_is_given_up(
    store: S3Store, s3_proxy: FaultProxy, tmp_path: Path, status: int
) -> None:
    store.put_bytes("f", DATA)
    s3_proxy.faults.status, s3_proxy.faults.statuses = status, -1
    with pytest.raises(
        StageError, match=rf"announced 3,000,000 bytes .* answered {status} .* 5 times in a row"
    ) as info:
        store.download_file("f", tmp_path / "f")
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    s3_proxy.faults.statuses = 2
    store.download_file("f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == DATA


def test_a_server_that_ignores_ranges_is_read_from_the_start_again(
    store: S3Store, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    store.put_bytes("f", DATA)
    s3_proxy.faults.ranges_ignored = True
    s3_proxy.faults.drop_after_bytes, s3_proxy.faults.drops = 1_000_000, 1
    moved: list[int] = []
    store.download_file("f", tmp_path / "f", moved.append)
    assert (tmp_path / "f").read_bytes() == DATA
    assert sum(moved) == len(DATA)
    assert min(moved) < 0


def test_an_answer_that_begins_elsewhere_is_not_appended(store: S3Store, s3_proxy: FaultProxy, tmp_path: Path) -> None:
    store.put_bytes("f", DATA)
    s3_proxy.faults.content_range = "bytes 5-2999999/3000000"
    with pytest.raises(
        StageError, match=r"asked for bytes 0-2999999 of 3000000, .* 206 with Content-Range 'bytes 5-"
    ) as info:
        store.download_file("f", tmp_path / "f")
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    assert (tmp_path / "f.part").stat().st_size == 0


def test_an_expired_token_is_waited_for_because_secrets_rotate(
    store: S3Store, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put_bytes("f", b"x")
    spec = {
        "model": {"uri": "hf://o/m"},
        "data": {"train": [{"uri": "s3://bucket/x"}]},
        "output": {"uri": "s3://bucket/out"},
    }
    ctx = Pod(tmp_path / "pod").context(spec)
    told: list[str] = []

    def pause(seconds: float) -> None:
        assert ctx.reporter._waiting is not None
        told.append(ctx.reporter._waiting.message)

    monkeypatch.setattr(waiting, "pause", pause)
    for action in (lambda: store.get_bytes("f"), lambda: store.head("f"), lambda: store.put_bytes("f", b"y")):
        s3_proxy.faults.expired = 2
        wait_until_available(ctx, action)
        assert told
        assert all("expired session token" in text for text in told)
        told.clear()


def test_a_download_of_200_megabytes_holds_a_few_parts_at_most(s3: S3, tmp_path: Path) -> None:
    s3.write_secret(tmp_path / "secret")
    store = connect(S3Location(s3.new_bucket(), "a"), Credentials("output", "s", tmp_path / "secret"), tmp_path)
    with (tmp_path / "big").open("wb") as file:
        for _ in range(70):
            file.write(DATA)
    sent = store.upload_file(tmp_path / "big", "big")
    before = anonymous_bytes()
    peak = 0

    def sample(_count: int) -> None:
        nonlocal peak
        peak = max(peak, anonymous_bytes() - before)

    assert store.download_file("big", tmp_path / "back", sample) == sent
    assert peak < 3 * s3_transfer.PART_BYTES, f"{peak / 1e6:.0f} MB"


def test_an_upload_that_arrives_wrong_is_refused_by_the_store(store: S3Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults.corrupt_uploads = 1
    with pytest.raises(StageError):
        store.put_bytes("f", DATA)
    assert not store.exists("f")
    store.put_bytes("f", DATA)
    assert store.get_bytes("f") == DATA


def test_an_upload_goes_on_with_the_parts_that_the_store_has(
    store: S3Store, s3: S3, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_transfer, "PART_BYTES", 5 << 20)  # the least that S3 takes
    data = DATA * 4
    (tmp_path / "big").write_bytes(data)
    s3_proxy.faults.fail_part = 3
    moved: list[int] = []
    with pytest.raises(StageError) as info:
        store.upload_file(tmp_path / "big", "big", moved.append)
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    assert sum(moved) == 0, "counted again by whoever goes on"
    assert not store.exists("big")
    s3_proxy.faults.fail_part = 0
    s3_proxy.faults.requests.clear()
    again = S3Store(store.location, store._client, store._uploads)  # as another process of the pod has it
    record = again.upload_file(tmp_path / "big", "big", moved.append)
    assert record == FileRecord(path="big", size=sum(moved), sha256=hashlib.sha256(data).hexdigest())
    assert [path.split("partNumber=")[1][0] for _, path in s3_proxy.faults.requests if "partNumber=" in path] == ["3"]
    assert store.get_bytes("big") == data
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=store.location.bucket)
    assert UploadRecord.upload_ids(store._uploads) == set()


def test_one_bad_moment_is_not_noticed_and_a_long_one_has_a_name(store: S3Store, s3_proxy: FaultProxy) -> None:
    store.put_bytes("f", b"x")
    s3_proxy.faults.unavailable = 1
    assert store.get_bytes("f") == b"x"
    s3_proxy.faults.unavailable = -1
    for action in (lambda: store.get_bytes("f"), lambda: store.put_bytes("f", b"y"), lambda: list(store.list())):
        with pytest.raises(StageError) as info:
            action()
        assert info.value.reason is Reason.STORAGE_UNAVAILABLE


def test_an_object_that_changes_while_it_is_read_is_read_whole_from_its_new_version(
    store: S3Store, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    store.put_bytes("f", DATA)
    s3_proxy.faults.drop_after_bytes, s3_proxy.faults.drops = 1_000_000, 1
    changed = DATA[::-1]
    moved: list[int] = []

    def change_once(count: int) -> None:
        if not moved:
            store.put_bytes("f", changed)
        moved.append(count)

    record = store.download_file("f", tmp_path / "f", change_once)
    assert (tmp_path / "f").read_bytes() == changed
    assert record.size == sum(moved) == len(DATA)
