"""Moving files to and from a bucket: part by part, resumed, hashed, checked."""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import urllib3.exceptions
from botocore.exceptions import BotoCoreError, ClientError

from finetune_api.failures import Reason
from finetune_api.results import FileRecord
from finetune_trainer.errors import StageError
from finetune_trainer.s3_errors import translate, translated

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import CompletedPartTypeDef

log = logging.getLogger(__name__)

OnBytes = Callable[[int], None]
CHUNK_BYTES = 1 << 20
PART_BYTES = 16 << 20
MAX_PARTS = 10_000
IDLE_ATTEMPTS = 4
"""Attempts in a row that bring no byte before a transfer is given up (and, by the caller, waited for)."""


def download(client: S3Client, bucket: str, key: str, name: str, path: Path, on_bytes: OnBytes | None) -> FileRecord:
    """Stream one version of an object to ``path``, continuing what an earlier call left in ``<path>.part``.

    Raises:
        StageError: StorageUnavailable after four attempts in a row without a byte, or if the bytes do not match the ETag twice.
        NotFound: no such object.
    """
    uri = f"s3://{bucket}/{key}"
    path.parent.mkdir(parents=True, exist_ok=True)
    first_md5: str | None = None
    while True:
        with translated(uri):
            head = client.head_object(Bucket=bucket, Key=key)
        part = PartialFile(path, f"{uri} {head['ETag']} {head['ContentLength']}")
        try:
            _fill(client, bucket, key, part, head["ETag"], head["ContentLength"], on_bytes)
        except _Changed:
            log.info("%s changed while it was read: starting again", uri)
            _told(on_bytes, -part.discard())
            continue
        md5 = part.md5.hexdigest()
        etag = head["ETag"].strip('"')
        plain = re.fullmatch(r"[0-9a-f]{32}", etag) and head.get("ServerSideEncryption") in (None, "AES256")
        # Some stores' ETags look like an MD5 and are none: the same bytes twice are no transfer error.
        if plain and md5 != etag and md5 != first_md5:
            log.warning("%s: the bytes read do not match the store's checksum: reading again", uri)
            if first_md5 is not None:
                raise StageError(Reason.STORAGE_UNAVAILABLE, f"{uri} reads differently each time")
            first_md5 = md5
            _told(on_bytes, -part.discard())
            continue
        sha256 = part.sha256.hexdigest()
        part.finish()
        return FileRecord(path=name, size=head["ContentLength"], sha256=sha256)


class _Changed(Exception):
    """The object is another version by now."""


def _fill(
    client: S3Client, bucket: str, key: str, part: PartialFile, etag: str, size: int, on_bytes: OnBytes | None
) -> None:
    uri = f"s3://{bucket}/{key}"
    idle = 0
    if part.size:
        _told(on_bytes, part.size)
    with part.open() as file:
        while part.size < size:
            before = part.size
            try:
                body = client.get_object(Bucket=bucket, Key=key, IfMatch=etag, Range=f"bytes={part.size}-{size - 1}")[
                    "Body"
                ]
                with body:
                    while chunk := body.read(min(CHUNK_BYTES, size - part.size)):
                        file.write(chunk)
                        part.feed(chunk)
                        _told(on_bytes, len(chunk))
            except (ClientError, BotoCoreError, urllib3.exceptions.HTTPError) as error:
                status = (
                    error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                    if isinstance(error, ClientError)
                    else None
                )
                if status in (412, 416):
                    raise _Changed from error
                named = translate(error, uri)
                if not (isinstance(named, StageError) and named.reason is Reason.STORAGE_UNAVAILABLE):
                    raise named from error
                cause = type(error).__name__
            else:
                cause = "the store closed the connection"
            idle = idle + 1 if part.size == before else 0
            if idle >= IDLE_ATTEMPTS:
                raise StageError(
                    Reason.STORAGE_UNAVAILABLE, f"reading {uri} stopped at {part.size:,} of {size:,} bytes: {cause}"
                )
            if part.size < size:
                log.info("reading %s stopped at %s of %s bytes (%s): resuming", uri, part.size, size, cause)
                time.sleep(0.2 * 2**idle)


class PartialFile:
    """``<path>.part`` beside a note of which version it belongs to. Survives a killed container."""

    def __init__(self, path: Path, version: str) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        self._note = path.with_name(path.name + ".part.json")
        self._version = version
        self._start()
        if self._note.exists() and self._part.exists() and json.loads(self._note.read_text()) == version:
            with self._part.open("rb") as file:
                while chunk := file.read(CHUNK_BYTES):
                    self.feed(chunk)
        else:
            self._part.unlink(missing_ok=True)
            self._note.write_text(json.dumps(version))

    def _start(self) -> None:
        self.size = 0
        self.sha256 = hashlib.sha256()
        self.md5 = hashlib.md5(usedforsecurity=False)

    def open(self) -> BinaryIO:
        """The file, to append to."""
        return self._part.open("ab")

    def feed(self, chunk: bytes) -> None:
        """Count and hash bytes that stand in the file."""
        self.size += len(chunk)
        self.sha256.update(chunk)
        self.md5.update(chunk)

    def discard(self) -> int:
        """Forget everything; returns how many bytes that were."""
        size = self.size
        self._part.unlink(missing_ok=True)
        self._note.unlink(missing_ok=True)
        self._start()
        return size

    def finish(self) -> None:
        """The file is whole: give it its name."""
        self._part.touch()
        self._part.replace(self.path)
        self._note.unlink(missing_ok=True)


def upload(client: S3Client, bucket: str, key: str, name: str, path: Path, on_bytes: OnBytes | None) -> FileRecord:
    """Upload a file in parts, hashing what is sent.

    Raises:
        StageError: StorageUnavailable, BucketNotFound, AccessDenied.
    """
    uri = f"s3://{bucket}/{key}"
    size = path.stat().st_size
    sha256 = hashlib.sha256()
    if size <= PART_BYTES:
        data = path.read_bytes()
        with translated(uri):
            client.put_object(Bucket=bucket, Key=key, Body=data, ContentMD5=md5_base64(data))
        _told(on_bytes, len(data))
        return FileRecord(path=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    part_bytes = max(PART_BYTES, math.ceil(size / MAX_PARTS))
    with translated(uri):
        upload_id = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
        parts: list[CompletedPartTypeDef] = []
        sent = 0
        try:
            with path.open("rb") as file:
                while data := file.read(part_bytes):
                    sha256.update(data)
                    answer = client.upload_part(
                        Bucket=bucket,
                        Key=key,
                        UploadId=upload_id,
                        PartNumber=len(parts) + 1,
                        Body=data,
                        ContentMD5=md5_base64(data),
                    )
                    parts.append({"ETag": answer["ETag"], "PartNumber": len(parts) + 1})
                    sent += len(data)
                    _told(on_bytes, len(data))
            client.complete_multipart_upload(
                Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        except BaseException:
            _abort(client, bucket, key, upload_id)
            _told(on_bytes, -sent)
            raise
    return FileRecord(path=name, size=sent, sha256=sha256.hexdigest())


def _abort(client: S3Client, bucket: str, key: str, upload_id: str) -> None:
    """Orphaned parts cost money and are seen by nobody: try to remove them."""
    try:
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except Exception as error:  # noqa: BLE001 - the error that led here is the one to tell
        log.warning("parts of the upload of s3://%s/%s may be left behind: %s", bucket, key, error)


def _told(on_bytes: OnBytes | None, count: int) -> None:
    if on_bytes is not None and count:
        on_bytes(count)


def md5_base64(data: bytes) -> str:
    """Content-MD5 of a request body."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
