"""Data from every kind of source: resumed, checked, and with errors that have names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import Reason
from finetune_api.spec import DataSource
from finetune_trainer.errors import StageError
from finetune_trainer.sources.data import fetch_data
from finetune_trainer.sources.web import download_url
from tests.support.hub_server import HubServer
from tests.support.tls import localhost_certificate
from tests.support.trainer_run import Pod
from tests.trainer.conftest import S3

SPEC: dict[str, Any] = {"data": {"train": [{"uri": "s3://bucket/x"}]}, "output": {"uri": "s3://bucket/out"}}


@pytest.fixture
def pod(tmp_path: Path) -> Pod:
    return Pod(tmp_path)


def data(pod: Pod, uri: str, **fields: Any) -> dict[str, bytes]:
    source = DataSource.model_validate({"uri": uri, **fields})
    ctx = pod.context({**SPEC, "model": {"uri": "hf://o/m"}})
    return {f.name: f.path.read_bytes() for f in fetch_data(ctx, source, "train-0", pod.work / "data")}


def test_data_of_a_prefix_are_all_its_data_files_in_order(pod: Pod, s3: S3) -> None:
    bucket = s3.new_bucket()
    for key in (
        "d/b.jsonl",
        "d/a/c.csv",
        "d/z.parquet",
        "d/README.md",
        "d/.hidden.json",
        "d/dataset_info.json",
        "e.jsonl",
    ):
        s3.put(bucket, key, key)
    s3.write_secret(pod.secrets / "train-0")
    ref = {"secretRef": {"name": "s3"}}
    assert list(data(pod, f"s3://{bucket}/d/", **ref)) == ["a/c.csv", "b.jsonl", "z.parquet"]
    assert list(data(pod, f"s3://{bucket}/d", **ref)) == ["a/c.csv", "b.jsonl", "z.parquet"]
    assert data(pod, f"s3://{bucket}/e.jsonl", **ref) == {"e.jsonl": b"e.jsonl"}
    for uri, reason in (
        (f"s3://{bucket}/none.jsonl", Reason.DATASET_NOT_FOUND),
        (f"s3://{bucket}/none/", Reason.DATASET_NOT_FOUND),
        ("s3://no-such-bucket/x.jsonl", Reason.BUCKET_NOT_FOUND),
    ):
        with pytest.raises(StageError) as info:
            data(pod, uri, **ref)
        assert info.value.reason is reason, uri


def test_data_from_the_hub_and_from_volumes(pod: Pod, hub: HubServer, tmp_path: Path) -> None:
    folder = tmp_path / "ds"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "train.jsonl").write_text("{}")
    (folder / "test.csv").write_text("a")
    hub.add_dataset("org/ds", folder)
    endpoint = {"endpointURL": hub.endpoint}
    assert list(data(pod, "hf://datasets/org/ds", **endpoint)) == ["data/train.jsonl", "test.csv"]
    assert list(data(pod, "hf://org/ds/data", **endpoint)) == ["data/train.jsonl"]
    assert list(data(pod, "hf://org/ds/test.csv", **endpoint)) == ["test.csv"]
    (pod.volumes / "claim").mkdir(parents=True)
    (pod.volumes / "claim" / "t.jsonl").write_text("{}")
    assert data(pod, "pvc://claim/t.jsonl") == {"t.jsonl": b"{}"}
    for uri in ("hf://org/none", "hf://org/ds/none", "pvc://claim/none.jsonl", "pvc://nothing/x"):
        with pytest.raises(StageError) as info:
            data(pod, uri, **endpoint)
        assert info.value.reason is Reason.DATASET_NOT_FOUND, uri


BODY = bytes(range(256)) * 1000


def fetch_url(hub: HubServer, path: Path, name: str = "/d/train.jsonl") -> bytes:
    download_url(hub.endpoint + name, path)
    return path.read_bytes()


def test_a_web_download_is_resumed_and_counted_once(hub: HubServer, tmp_path: Path) -> None:
    hub.files["/d/train.jsonl"] = BODY
    hub.faults.drop_after_bytes, hub.faults.drops = 100_000, 2
    moved: list[int] = []
    download_url(hub.endpoint + "/d/train.jsonl", tmp_path / "f", on_bytes=moved.append)
    assert (tmp_path / "f").read_bytes() == BODY
    assert sum(moved) == len(BODY)
    assert [r for _, _, r, _ in hub.log.requests] == [None, "bytes=100000-", "bytes=200000-"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["f"]


@pytest.mark.parametrize("fault", ["ignore_ranges", "change_etag"])
def test_a_web_download_never_mixes_versions_or_offsets(hub: HubServer, tmp_path: Path, fault: str) -> None:
    hub.files["/d/train.jsonl"] = BODY
    part = tmp_path / "f.part"
    part.write_bytes(b"another version")
    (tmp_path / "f.part.json").write_text(json.dumps({"url": hub.endpoint + "/d/train.jsonl", "etag": '"old"'}))
    setattr(hub.faults, fault, True)
    assert fetch_url(hub, tmp_path / "f") == BODY


@pytest.mark.parametrize(
    ("unavailable", "name", "reason"), [(0, "/none", Reason.DATASET_NOT_FOUND), (-1, "/none", Reason.HUB_UNAVAILABLE)]
)
def test_web_errors_have_names(hub: HubServer, tmp_path: Path, unavailable: int, name: str, reason: Reason) -> None:
    hub.faults.unavailable = unavailable
    with pytest.raises(StageError) as info:
        fetch_url(hub, tmp_path / "f", name)
    assert info.value.reason is reason


def test_a_private_ca_may_stand_in_the_secret_of_a_web_source(pod: Pod, tmp_path: Path) -> None:
    ca, tls = localhost_certificate(tmp_path / "tls")
    with HubServer(tls) as server:
        server.files["/d/train set.jsonl"] = b"{}"
        uri = f"{server.endpoint}/d/train%20set.jsonl?sig=1"
        with pytest.raises(StageError, match="certificate verify failed") as info:
            data(pod, uri)
        assert info.value.reason is Reason.HUB_UNAVAILABLE
        (pod.secrets / "train-0").mkdir(parents=True)
        (pod.secrets / "train-0" / "AWS_CA_BUNDLE").write_text(ca.read_text())
        assert data(pod, uri, secretRef={"name": "ca"}) == {"train set.jsonl": b"{}"}
