"""A local file as an object, part by part; and what both directions share."""

from __future__ import annotations

import base64
import hashlib
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from finetune_api.results import FileRecord
from finetune_trainer.s3_errors import translated

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
        told(on_bytes, len(data))
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
                    told(on_bytes, len(data))
            client.complete_multipart_upload(
                Bucket=bucket, Key=key, UploadId=upload_id, MultipartUpload={"Parts": parts}
            )
        except BaseException:
            _abort(client, bucket, key, upload_id)
            told(on_bytes, -sent)
            raise
    return FileRecord(path=name, size=sent, sha256=sha256.hexdigest())


def _abort(client: S3Client, bucket: str, key: str, upload_id: str) -> None:
    """Orphaned parts cost money and are seen by nobody: try to remove them."""
    try:
        client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except Exception as error:  # noqa: BLE001 - the error that led here is the one to tell
        log.warning("parts of the upload of s3://%s/%s may be left behind: %s", bucket, key, error)


def told(on_bytes: OnBytes | None, count: int) -> None:
    """``count`` more bytes were moved (negative: must be moved again)."""
    if on_bytes is not None and count:
        on_bytes(count)


def md5_base64(data: bytes) -> str:
    """Content-MD5 of a request body."""
    return base64.b64encode(hashlib.md5(data, usedforsecurity=False).digest()).decode()
