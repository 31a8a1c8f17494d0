"""Real servers and a real small model for the stages' tests."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import boto3
import pytest
from hypothesis import settings

from finetune_trainer.entrypoint import LIBRARIES
from tests.support import seaweed
from tests.support.fault_proxy import FaultProxy
from tests.support.hub_server import HubServer
from tests.support.tiny_model import build_tiny_model

# Cores are shared with servers and other workers: how long an example takes says nothing.
settings.register_profile("shared-cores", deadline=None)
settings.load_profile("shared-cores")

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

    from tests.support.prepare_bench import Bench


@dataclass(frozen=True)
class S3:
    """A running S3 server: its address, keys, and an administrator's client."""

    endpoint: str
    access_key: str
    secret_key: str
    client: S3Client

    def new_bucket(self) -> str:
        """A bucket of its own for one test."""
        name = f"bucket-{uuid.uuid4().hex[:12]}"
        self.client.create_bucket(Bucket=name)
        return name

    def put(self, bucket: str, key: str, data: bytes | str) -> None:
        """Write an object."""
        self.client.put_object(Bucket=bucket, Key=key, Body=data.encode() if isinstance(data, str) else data)

    def put_dir(self, bucket: str, prefix: str, folder: Path) -> None:
        """Write all files of a folder."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.put(bucket, f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def get_dir(self, bucket: str, prefix: str, folder: Path) -> None:
        """Read all objects below a prefix into a folder."""
        for key in self.keys(bucket, f"{prefix}/"):
            path = folder / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.client.get_object(Bucket=bucket, Key=key)["Body"].read())

    def keys(self, bucket: str, prefix: str = "") -> list[str]:
        """Keys below a prefix."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def write_secret(
        self, folder: Path, *, key: str | None = None, secret: str | None = None, endpoint: str | None = None
    ) -> None:
        """A Secret as the kubelet mounts it: a folder of files."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "AWS_ACCESS_KEY_ID").write_text(key or self.access_key)
        (folder / "AWS_SECRET_ACCESS_KEY").write_text(secret or self.secret_key)
        (folder / "AWS_ENDPOINT_URL").write_text(endpoint or self.endpoint)


@contextmanager
def s3_server(folder: Path) -> Iterator[S3]:
    """SeaweedFS. ``access_key`` may read and write everything but is no administrator, so that missing buckets stay missing."""
    server = seaweed.start_seaweed(folder)
    client = boto3.client(
        "s3",
        endpoint_url=server.endpoint,
        aws_access_key_id=seaweed.ACCESS_KEY,
        aws_secret_access_key=seaweed.SECRET_KEY,
        region_name="us-east-1",
    )
    try:
        yield S3(server.endpoint, seaweed.WRITER_KEY, seaweed.WRITER_SECRET, client)
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def stage_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of every stage, which processes that it starts inherit."""
    for name, value in LIBRARIES.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="session")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """A real S3 server."""
    with s3_server(tmp_path_factory.mktemp("seaweed")) as running:
        yield running


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a ChatML template, as a folder. Read-only by convention."""
    return build_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A server that answers as the Hugging Face Hub does; see its ``faults``."""
    with HubServer() as server:
        yield server


@pytest.fixture
def s3_proxy(s3: S3) -> Iterator[FaultProxy]:
    """A proxy in front of ``s3`` with fault switches."""
    with FaultProxy(s3.endpoint) as proxy:
        yield proxy


@pytest.fixture
def bench(tmp_path: Path, s3: S3, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """A bucket with the tiny model, and the prepare stage to run on it. A stage that waits where it should fail fails here."""
    from tests.support.prepare_bench import Bench  # it imports transformers: only whoever needs it waits for that

    def never(seconds: float) -> None:
        raise AssertionError("the stage waits")

    monkeypatch.setattr("finetune_trainer.waiting.pause", never)
    return Bench(tmp_path / "pod", s3, tiny_model)
