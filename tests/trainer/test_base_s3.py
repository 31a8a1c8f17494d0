"""The S3 store against a real server."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.progress import Transfer
from finetune_api.results import FileRecord
from finetune_api.uris import S3Location
from finetune_cluster.ports import free_ports
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import Interrupted, NotFound, StageError
from finetune_trainer.parallel import Stopped, in_parallel
from finetune_trainer.s3 import S3Store, connect
from finetune_trainer.s3_transfer import PART_BYTES
from tests.support import seaweed
from tests.support.fault_proxy import Fault, FaultProxy
from tests.support.hub_server import HubServer
from tests.trainer.conftest import S3


@pytest.fixture
def store(s3: S3, tmp_path: Path) -> S3Store:
    s3.write_secret(tmp_path / "secret")
    return connect(S3Location(s3.new_bucket(), "team/a"), Credentials("output", "s", tmp_path / "secret"), tmp_path)


def test_small_objects_round_trip_and_know_their_hash(store: S3Store) -> None:
    record = store.put_bytes("x/y.bin", b"abc")
    assert (record.path, record.size, record.sha256) == ("x/y.bin", 3, hashlib.sha256(b"abc").hexdigest())
    assert store.get_bytes("x/y.bin") == b"abc"
    assert store.exists("x/y.bin")
    assert not store.exists("x")
    assert store.read_range("x/y.bin", 1, 100) == b"bc"
    store.put_model("m.json", Transfer(completed_bytes=4))
    assert store.get_model("m.json", Transfer) == Transfer(completed_bytes=4)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES + 5])
def test_files_of_every_number_of_parts_round_trip(store: S3Store, tmp_path: Path, size: int) -> None:
    source = tmp_path / "source"
    data = bytes(range(256)) * (size // 256 + 1)
    source.write_bytes(data[:size])
    moved: list[int] = []
    up = store.upload_file(source, "f", moved.append)
    down = store.download_file("f", tmp_path / "down", moved.append)
    assert up == down
    assert (tmp_path / "down").read_bytes() == data[:size]
    assert sum(moved) == 2 * size
    assert sorted(p.name for p in tmp_path.glob("down*")) == ["down"]


def test_an_interrupted_download_continues_where_it_stopped(store: S3Store, tmp_path: Path) -> None:
    store.put_bytes("f", b"0123456789")

    class Killed(BaseException):
        pass

    def kill_after_first(count: int) -> None:
        raise Killed

    with pytest.raises(Killed):
        store.download_file("f", tmp_path / "f", kill_after_first)
    assert (tmp_path / "f.part").read_bytes() == b"0123456789"
    counted: list[int] = []
    record = store.download_file("f", tmp_path / "f", counted.append)
    assert record.sha256 == hashlib.sha256(b"0123456789").hexdigest()
    assert (tmp_path / "f").read_bytes() == b"0123456789"


def test_a_part_of_another_version_is_not_continued(store: S3Store, tmp_path: Path) -> None:
    store.put_bytes("f", b"new content")
    (tmp_path / "f.part").write_bytes(b"old")
    (tmp_path / "f.part.json").write_text('"another version"')
    store.download_file("f", tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"new content"


def test_folders_round_trip_with_relative_paths(store: S3Store, tmp_path: Path) -> None:
    local = tmp_path / "in"
    for name in ("a", "b/c", "b/d/e"):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_text(name)
    up = store.upload_dir(local, "adapter")
    assert [r.path for r in up] == ["adapter/a", "adapter/b/c", "adapter/b/d/e"]
    assert [store.download_file(r.path, tmp_path / "out" / r.path) for r in up] == up
    assert [i.key for i in store.list("adapter")] == [r.path for r in up]
    assert store.delete_prefix("adapter/b") == 2
    assert [i.key for i in store.list()] == ["adapter/a"]


def test_list_pages_through_many_objects(store: S3Store) -> None:
    for i in range(12):
        store.put_bytes(f"many/{i:02d}", b"")
    assert len(list(store.list("many"))) == 12


def test_a_failed_upload_leaves_no_parts_behind(store: S3Store, s3: S3, tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(b"x" * (PART_BYTES + 1))

    def fail(count: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError):
        store.upload_file(tmp_path / "big", "big", fail)
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=store.location.bucket)
    assert not store.exists("big")


def test_missing_things_have_names(s3: S3, store: S3Store, tmp_path: Path) -> None:
    for call in (
        lambda: store.get_bytes("no"),
        lambda: store.head("no"),
        lambda: store.download_file("no", tmp_path / "x"),
    ):
        with pytest.raises(NotFound):
            call()
    nowhere = connect(S3Location("no-such-bucket", "p"), Credentials("output", "s", tmp_path / "secret"), tmp_path)
    for action in (
        lambda: nowhere.put_bytes("x", b""),
        lambda: nowhere.exists("x"),
        lambda: list(nowhere.list()),
        lambda: nowhere.get_bytes("x"),
    ):
        with pytest.raises(StageError) as info:
            action()
        assert info.value.reason is Reason.BUCKET_NOT_FOUND
        assert "no-such-bucket" in info.value.message


@pytest.mark.parametrize(
    ("key", "secret"), [("nobody", "x"), (seaweed.WRITER_KEY, "wrong")], ids=["unknown key", "wrong secret"]
)
def test_wrong_credentials_are_refused(s3: S3, tmp_path: Path, key: str, secret: str) -> None:
    s3.write_secret(tmp_path / "bad", key=key, secret=secret)
    store = connect(S3Location(s3.new_bucket(), ""), Credentials("output", "s", tmp_path / "bad"), tmp_path)
    for action in (lambda: store.put_bytes("x", b""), lambda: store.exists("x"), lambda: list(store.list())):
        with pytest.raises(StageError) as info:
            action()
        assert info.value.reason is Reason.ACCESS_DENIED


def test_a_reader_may_not_write(s3: S3, tmp_path: Path) -> None:
    s3.write_secret(tmp_path / "reader", key=seaweed.READER_KEY, secret=seaweed.READER_SECRET)
    store = connect(S3Location(s3.new_bucket(), ""), Credentials("output", "s", tmp_path / "reader"), tmp_path)
    assert list(store.list()) == []
    with pytest.raises(StageError) as info:
        store.put_bytes("x", b"")
    assert info.value.reason is Reason.ACCESS_DENIED


def test_an_unreachable_store_is_known_within_seconds(tmp_path: Path, s3: S3) -> None:
    port = free_ports(1)[0]
    s3.write_secret(tmp_path / "secret", endpoint=f"http://127.0.0.1:{port}")
    store = connect(S3Location("b", ""), Credentials("output", "s", tmp_path / "secret"), tmp_path)
    with pytest.raises(StageError) as info:
        store.get_bytes("x")
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE


def test_a_web_server_that_is_no_store_is_not_taken_for_an_empty_one(s3: S3, hub: HubServer, tmp_path: Path) -> None:
    s3.write_secret(tmp_path / "secret", endpoint=hub.endpoint)
    store = connect(S3Location("bucket", ""), Credentials("output", "s", tmp_path / "secret"), tmp_path)
    with pytest.raises(StageError, match="404 without an S3 error") as info:
        store.get_bytes("x")
    assert info.value.reason is Reason.STORAGE_UNAVAILABLE


def test_rotated_credentials_are_used_by_a_store_that_is_open(s3: S3, store: S3Store, tmp_path: Path) -> None:
    store.put_bytes("x", b"1")
    again = connect(store.location, Credentials("output", "s", tmp_path / "secret"), tmp_path)
    s3.write_secret(tmp_path / "secret", key="nobody", secret="x")
    reads: list[Callable[[S3Store], object]] = [
        lambda store: store.get_bytes("x"),
        lambda store: store.head("x"),
        lambda store: store.exists("x"),
        lambda store: store.download_file("x", tmp_path / "y"),
        lambda store: list(store.list()),
    ]
    for read in reads:
        for opened in (store, again):  # one of which has never been accepted itself
            with pytest.raises(StageError, match="taken for rotated") as info:
                read(opened)
            assert info.value.reason is Reason.ACCESS_DENIED
            assert info.value.patience_seconds, "waited for, not failed"
    s3.write_secret(tmp_path / "secret")
    assert store.get_bytes("x") == b"1"


def test_an_object_that_may_not_be_read_is_not_taken_for_rotated_credentials(
    s3: S3, s3_proxy: FaultProxy, tmp_path: Path
) -> None:
    s3.write_secret(tmp_path / "secret", endpoint=s3_proxy.endpoint)
    store = connect(S3Location(s3.new_bucket(), "a"), Credentials("output", "s", tmp_path / "secret"), tmp_path)
    store.put_bytes("x", b"1")
    s3_proxy.faults.script = [Fault("HEAD|GET", times=-1, status=403, code="AccessDenied")]
    with pytest.raises(StageError, match="needs s3:GetObject and s3:ListBucket") as info:
        store.head("x")
    assert info.value.reason is Reason.ACCESS_DENIED
    assert info.value.patience_seconds is None


@pytest.mark.parametrize("data", [b"", b"1"], ids=["empty", "not empty"])
def test_a_refusal_that_ends_while_its_reason_is_asked_for_is_none(
    s3: S3, s3_proxy: FaultProxy, tmp_path: Path, data: bytes
) -> None:
    """A Secret's new values reach the pod between two requests."""
    s3.write_secret(tmp_path / "secret", endpoint=s3_proxy.endpoint)
    store = connect(S3Location(s3.new_bucket(), "a"), Credentials("output", "s", tmp_path / "secret"), tmp_path)
    store.put_bytes("x", data)
    s3_proxy.faults.script = [Fault("HEAD", status=403)]
    assert store.head("x").size == len(data)


def test_a_missing_secret_is_waited_for(tmp_path: Path) -> None:
    with pytest.raises(StageError) as info:
        connect(S3Location("b", ""), Credentials("output", "keys", tmp_path / "none"), tmp_path)
    assert info.value.reason is Reason.SECRET_MISSING
    (tmp_path / "part").mkdir()
    (tmp_path / "part" / "AWS_ACCESS_KEY_ID").write_text("x")
    (tmp_path / "part" / "AWS_SESSION_TOKEN").write_text("\n")
    with pytest.raises(
        StageError,
        match=r"lacks AWS_SECRET_ACCESS_KEY; it has AWS_ACCESS_KEY_ID, AWS_SESSION_TOKEN .empty.; expected the keys AWS_A",
    ):
        connect(S3Location("b", ""), Credentials("output", "keys", tmp_path / "part"), tmp_path)


def test_a_secret_with_other_keys_names_those_found_and_those_expected(tmp_path: Path) -> None:
    folder = tmp_path / "secret"
    (folder / "..2026_01_01").mkdir(parents=True)
    for key in ("accessKey", "secretKey"):
        (folder / "..2026_01_01" / key).write_text("x")
        (folder / key).symlink_to(folder / "..2026_01_01" / key)
    (folder / "..data").symlink_to("..2026_01_01")
    with pytest.raises(StageError) as info:
        connect(S3Location("b", ""), Credentials("output", "keys", folder), tmp_path)
    assert info.value.reason is Reason.SECRET_MISSING
    assert info.value.message == (
        "Secret keys (for output) lacks AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; it has accessKey, secretKey; "
        "expected the keys AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY"
    )


def test_sigterm_during_parallel_uploads_waits_for_no_file(store: S3Store, tmp_path: Path) -> None:
    local = tmp_path / "in"
    local.mkdir()
    for i in range(6):
        (local / str(i)).write_bytes(b"x")
    release, at_work = threading.Event(), threading.Event()
    upload_file = store.upload_file
    counted: list[int] = []

    def slow(path: Path, key: str, on_bytes: Any) -> FileRecord:
        if path.name == "0":
            at_work.wait(10)
            raise Interrupted  # as SIGTERM's handler does in the main thread
        at_work.set()
        release.wait(10)
        return upload_file(path, key, on_bytes)

    store.upload_file = slow  # type: ignore[method-assign,assignment]
    started = time.monotonic()
    with pytest.raises(Interrupted):
        store.upload_dir(local, "adapter", counted.append)
    assert time.monotonic() - started < 5
    release.set()
    for thread in threading.enumerate():
        if thread.name.startswith("files"):
            thread.join(10)
    assert counted == []


def test_a_failed_file_stops_the_others_before_anybody_tries_again() -> None:
    all_at_work = threading.Barrier(4)
    stopped: list[str] = []

    def work(item: str, check: Callable[[], None]) -> None:
        all_at_work.wait(10)
        if item == "bad":
            raise ValueError(item)
        while True:
            try:
                check()
            except Stopped:
                stopped.append(item)
                raise
            time.sleep(0.001)

    with pytest.raises(ValueError, match="bad"):
        in_parallel(work, ["a", "b", "bad", "c"])
    assert sorted(stopped) == ["a", "b", "c"]
