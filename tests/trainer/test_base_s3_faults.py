"""Transfers through a proxy that breaks what networks and stores break."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from finetune_api.failures import Reason
from finetune_api.uris import S3Location
from finetune_trainer import s3_transfer
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import StageError
from finetune_trainer.s3 import S3Store, connect
from tests.support.fault_proxy import FaultProxy
from tests.trainer.conftest import S3

DATA = random.Random(0).randbytes(3_000_000)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetune_trainer.s3_transfer.time.sleep", lambda seconds: None)
    monkeypatch.setattr(s3_transfer, "CHUNK_BYTES", 100_000)


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


def test_an_upload_that_arrives_wrong_is_refused_by_the_store(store: S3Store, s3_proxy: FaultProxy) -> None:
    s3_proxy.faults.corrupt_uploads = 1
    with pytest.raises(StageError):
        store.put_bytes("f", DATA)
    assert not store.exists("f")
    store.put_bytes("f", DATA)
    assert store.get_bytes("f") == DATA


def test_a_failed_part_leaves_no_upload_behind(
    store: S3Store, s3: S3, s3_proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3_transfer, "PART_BYTES", 5 << 20)  # the least that S3 takes
    data = DATA * 4
    (tmp_path / "big").write_bytes(data)
    s3_proxy.faults.fail_part = 2
    moved: list[int] = []
    with pytest.raises(StageError) as info:
        store.upload_file(tmp_path / "big", "big", moved.append)
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=store.location.bucket)
    s3_proxy.faults.fail_part = 0
    assert store.upload_file(tmp_path / "big", "big", moved.append).size == sum(moved) == len(data)
    assert store.get_bytes("big") == data


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
