"""One place below a bucket: small objects, files and folders, with errors that have names.

Memory is bounded by a part. Every upload carries an MD5 that the store checks; every download is tied to one version of the
object (ETag), counted, and checked against what the store tells of its bytes. boto3's own transfer manager does neither resume
nor hash while reading, therefore the loops of s3_download and s3_upload.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import boto3
import botocore.loaders
import botocore.session
from botocore.awsrequest import AWSResponse
from botocore.config import Config
from botocore.credentials import Credentials as BotocoreCredentials
from botocore.credentials import ReadOnlyCredentials
from botocore.model import OperationModel
from pydantic import BaseModel

from finetune_api.failures import Reason
from finetune_api.results import FileRecord
from finetune_api.uris import S3Location
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.parallel import WORKERS, in_parallel
from finetune_trainer.s3_download import download
from finetune_trainer.s3_errors import WORKED_BEFORE, must_be_whole, translated
from finetune_trainer.s3_read import head_object, in_time, read_object
from finetune_trainer.s3_transfer import OnBytes, PacedBody, md5_base64, told
from finetune_trainer.s3_upload import abort_orphans, upload
from finetune_trainer.s3_upload_record import UploadRecord

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListObjectsV2OutputTypeDef

log = logging.getLogger(__name__)
M = TypeVar("M", bound=BaseModel)
Records = list[FileRecord]  # S3Store.list hides the builtin inside the class

CLIENT_CONFIG = {
    # botocore waits 60 s to connect, times its retries: "unreachable" must be known, and said, within seconds.
    "connect_timeout": 5,
    "read_timeout": 20,
    "retries": {"mode": "standard", "total_max_attempts": 2},
    "tcp_keepalive": True,
    "max_pool_connections": 2 * WORKERS,
    # The newer default (CRC32 trailers in aws-chunked bodies) is unknown to many S3-compatible stores; MD5 is known to all.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}


UPLOADS_DIR = ".uploads"
"""Below a store's scratch folder."""

# botocore parses a megabyte of service description per session; a shared loader does it once.
_LOADER = botocore.loaders.create_loader()


@dataclass(frozen=True)
class ObjectInfo:
    """An object below the store's location; ``key`` is relative to it."""

    key: str
    size: int
    etag: str


class FolderCredentials(BotocoreCredentials):
    """Credentials that are read from the mounted Secret for every request, so that a rotation needs no restart."""

    def __init__(self, source: Credentials) -> None:
        self._source = source
        super().__init__(*self._read())

    def _read(self) -> tuple[str, str, str | None]:
        values = self._source.aws()
        assert values is not None
        return values

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Called by botocore's signer for each request."""
        return ReadOnlyCredentials(*self._read())


class _FolderProvider:
    METHOD = "finetune-secret"
    CANONICAL_NAME = "finetune-secret"

    def __init__(self, source: Credentials) -> None:
        self._source = source

    def load(self) -> FolderCredentials:
        return FolderCredentials(self._source)


def make_client(credentials: Credentials, scratch: Path) -> S3Client:
    """A client for one source. ``scratch`` takes the CA bundle, where the Secret holds one."""
    credentials.aws()  # a missing Secret is told before anything is tried
    session = botocore.session.get_session()
    session.register_component("data_loader", _LOADER)
    if credentials.folder is not None:
        session.get_component("credential_provider").insert_before("env", _FolderProvider(credentials))
    endpoint = credentials.endpoint_url
    ca_bundle = credentials.ca_bundle(scratch)
    config = Config(**CLIENT_CONFIG, s3={"addressing_style": "path"}) if endpoint else Config(**CLIENT_CONFIG)  # type: ignore[arg-type]
    client = boto3.Session(botocore_session=session).client(
        "s3",
        endpoint_url=endpoint,
        region_name=credentials.region or session.get_config_variable("region") or "us-east-1",
        verify=str(ca_bundle) if ca_bundle else None,
        config=config,
    )
    client.meta.events.register("after-call.s3", _Memory(credentials).note)
    return client


_ACCEPTED: set[Path] = set()
"""Folders of Secrets whose values a store has accepted in this process: a store that is opened anew knows of it too."""


class _Memory:
    """Notes whether credentials that are refused had been accepted: then they were rotated, and are not just wrong."""

    def __init__(self, credentials: Credentials) -> None:
        self._folder = credentials.folder

    def note(self, http_response: AWSResponse, parsed: dict[str, Any], model: OperationModel, **_: object) -> None:
        """botocore's event after each answer. Raises TornAnswer."""
        must_be_whole(model.name, http_response.status_code, parsed)
        if self._folder is None:
            return
        if http_response.status_code < 300:
            _ACCEPTED.add(self._folder)
        elif self._folder in _ACCEPTED and "Error" in parsed:
            parsed["Error"][WORKED_BEFORE] = True


def connect(location: S3Location, credentials: Credentials, scratch: Path) -> S3Store:
    """The store at ``location``. Nothing is sent yet.

    Raises:
        StageError: SecretMissing.
    """
    return S3Store(location, make_client(credentials, scratch), scratch / UPLOADS_DIR)


class S3Store:
    """Objects below one location. Keys are relative to it; ``""`` is the location itself.

    Every method raises StageError (BucketNotFound, AccessDenied, StorageUnavailable, StorageFull) or NotFound.
    """

    def __init__(self, location: S3Location, client: S3Client, uploads: Path) -> None:
        """``uploads``: a folder for notes of multipart uploads that a later call, or process, may go on with."""
        self.location = location
        self._client = client
        self._uploads = uploads

    def at(self, *parts: str) -> S3Store:
        """The store below ``parts``."""
        return S3Store(self.location.join(*parts), self._client, self._uploads)

    def uri(self, key: str = "") -> str:
        """``s3://bucket/prefix/key``."""
        return str(self.location.join(key))

    def get_bytes(self, key: str) -> bytes:
        """A small object."""
        return read_object(self._client, self.location.bucket, self._key(key))

    def put_bytes(self, key: str, data: bytes, content_type: str = "binary/octet-stream") -> FileRecord:
        """Write a small object; the store checks the MD5."""
        with translated(self.uri(key)):
            self._client.put_object(
                Bucket=self.location.bucket,
                Key=self._key(key),
                Body=PacedBody(data),
                ContentMD5=md5_base64(data),
                ContentType=content_type,
            )
        return FileRecord(path=key, size=len(data), sha256=hashlib.sha256(data).hexdigest())

    def get_model(self, key: str, model: type[M]) -> M:
        """A JSON object as ``model``; pydantic's ValidationError if it is none."""
        return model.model_validate_json(self.get_bytes(key))

    def put_model(self, key: str, value: BaseModel) -> FileRecord:
        """Write ``value`` as JSON, camelCase, without absent fields."""
        return self.put_bytes(key, value.model_dump_json(by_alias=True, exclude_none=True, indent=1).encode())

    def head(self, key: str) -> ObjectInfo:
        """Size and ETag; NotFound."""
        with translated(self.uri(key)):
            answer = head_object(self._client, self.location.bucket, self._key(key))
        return ObjectInfo(key, answer["ContentLength"], answer["ETag"])

    def exists(self, key: str) -> bool:
        """Whether the object is there."""
        try:
            self.head(key)
        except NotFound:
            # HEAD has no body, so a missing bucket looks like a missing key: listing tells them apart.
            self.check_bucket()
            return False
        return True

    def check_bucket(self) -> None:
        """BucketNotFound or AccessDenied, if so."""
        with translated(self.uri()):
            self._page(self._key(""), MaxKeys=1)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Objects whose key starts with the folder ``prefix``, in key order; empty for none."""
        root = self._key(prefix)
        folder = f"{root}/" if root else ""
        base = f"{self.location.key}/" if self.location.key else ""
        following: dict[str, Any] = {}
        while True:
            with translated(self.uri(prefix)):
                page = self._page(folder, **following)
            for item in page.get("Contents", []):
                if not item["Key"].endswith("/"):
                    yield ObjectInfo(item["Key"].removeprefix(base), item["Size"], item["ETag"])
            token = page.get("NextContinuationToken")
            if not page.get("IsTruncated") or not token:
                return
            following = {"ContinuationToken": token}

    def _page(self, prefix: str, **arguments: Any) -> ListObjectsV2OutputTypeDef:
        return in_time(
            self.uri(),
            lambda: self._client.list_objects_v2(Bucket=self.location.bucket, Prefix=prefix, **arguments),
        )

    def read_range(self, key: str, start: int, length: int) -> bytes:
        """``length`` bytes from ``start`` (fewer at the end of the object)."""
        wanted = f"bytes={start}-{start + length - 1}"
        return read_object(self._client, self.location.bucket, self._key(key), Range=wanted)

    def download_file(self, key: str, path: Path, on_bytes: OnBytes | None = None) -> FileRecord:
        """Stream an object to ``path``; an interrupted download of the same version is continued. Returns its SHA-256."""
        return download(self._client, self.location.bucket, self._key(key), key, path, on_bytes)

    def upload_file(self, path: Path, key: str, on_bytes: OnBytes | None = None) -> FileRecord:
        """Stream a file to an object. Of the same file, an upload that stopped is gone on with, and one that is complete is not sent
        again while the object stands. Returns its SHA-256."""
        return upload(self._client, self.location.bucket, self._key(key), key, path, self._uploads, on_bytes)

    def abort_orphans(self, prefix: str = "") -> int:
        """Remove multipart uploads below the folder ``prefix`` that this pod does not know; returns how many.

        Call it where the folder belongs to this job alone: an execution that still runs elsewhere loses its uploads. A store that
        refuses costs a warning.
        """
        return abort_orphans(self._client, self.location.bucket, f"{self._key(prefix)}/".lstrip("/"), self._uploads)

    def upload_dir(self, local: Path, prefix: str, on_bytes: OnBytes | None = None) -> Records:
        """All files below ``local``; paths in the records start with ``prefix``."""
        files = sorted(p for p in local.rglob("*") if p.is_file())
        return in_parallel(
            lambda path, check: self.upload_file(
                path, _join(prefix, path.relative_to(local).as_posix()), _checked(check, on_bytes)
            ),
            files,
        )

    def delete(self, key: str) -> None:
        """Delete an object, if it is there."""
        with translated(self.uri(key)):
            self._client.delete_object(Bucket=self.location.bucket, Key=self._key(key))
        UploadRecord(self._uploads, self.location.bucket, self._key(key)).forget()

    def clear(self, prefix: str) -> None:
        """Delete what an earlier execution left below ``prefix``, as far as the credentials may.

        What stays is written over, or listed in no manifest: credentials that may not delete must not cost a finished run.
        """
        try:
            self.delete_prefix(prefix)
        except StageError as error:
            if error.reason is not Reason.ACCESS_DENIED:
                raise
            log.warning("what an earlier execution left below %s stays: %s", self.uri(prefix), error.message)

    def delete_prefix(self, prefix: str) -> int:
        """Delete all objects below the folder ``prefix``; returns how many."""
        count = 0
        for info in list(self.list(prefix)):
            # One by one: DeleteObjects needs a checksum header on which S3-compatible stores disagree.
            self.delete(info.key)
            count += 1
        return count

    def _key(self, key: str) -> str:
        return self.location.join(key).key


def _checked(check: Callable[[], None], on_bytes: OnBytes | None) -> OnBytes:
    """``on_bytes`` that ends the transfer when nobody waits for it any more. Bytes taken back end nothing: that is the cleaning up."""

    def moved(count: int) -> None:
        if count > 0:
            check()
        told(on_bytes, count)

    return moved


def _join(*parts: str) -> str:
    return "/".join(p.strip("/") for p in parts if p.strip("/"))
