"""What a store tells of an object's bytes, and whether the bytes that arrived are those.

Three things may be told, and each is checked where it is. A full-object SHA-256 or CRC32 (``ChecksumMode=ENABLED``). An ETag that
is the MD5 of the object. An ETag ``<md5>-<N>`` of an object that was uploaded in N parts, the MD5 of the parts' MD5s: for that the
parts' size must be known, which HEAD with ``PartNumber`` tells (AWS; SeaweedFS 4.48 too). Parts of different sizes, CRC32C and
CRC64NVME (botocore needs awscrt for them) and composite checksums go unchecked; so do ETags under SSE-KMS and SSE-C and in
directory buckets, which are no MD5.
https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from botocore.exceptions import ClientError

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.s3_errors import translate, translated
from finetune_trainer.s3_read import head_object

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import HeadObjectOutputTypeDef

ETAG = re.compile(r'"?(?P<md5>[0-9a-f]{32})(-(?P<parts>[0-9]+))?"?')


@dataclass(frozen=True)
class Version:
    """One version of an object, and the checksums that its bytes must have (None: not told)."""

    etag: str
    size: int
    md5: str | None = None
    part_bytes: int | None = None
    """Size of each part but the last; present where ``md5`` is that of the parts' MD5s."""
    sha256: str | None = None
    crc32: int | None = None

    def mismatch(self, found: Hashes) -> str | None:
        """What differs, found and expected; None if nothing does."""
        pairs = [("SHA-256", found.sha256.hexdigest(), self.sha256)]
        if self.crc32 is not None:
            pairs.append(("CRC32", f"{found.crc32:08x}", f"{self.crc32:08x}"))
        if self.md5 is not None:
            pairs.append(("MD5" if self.part_bytes is None else "MD5 over the parts' MD5s", found.md5(), self.md5))
        wrong = [f"{name} {has}, the store names {wanted}" for name, has, wanted in pairs if wanted not in (None, has)]
        return "; ".join(wrong) or None


class Hashes:
    """Hashes of a stream of bytes: always SHA-256, of the others those that ``version`` needs."""

    def __init__(self, version: Version) -> None:
        self._part_bytes = version.part_bytes
        self._wants_md5 = version.md5 is not None
        self._wants_crc32 = version.crc32 is not None
        self.sha256 = hashlib.sha256()
        self.crc32 = 0
        self._part = _md5()
        self._in_part = 0
        self._parts: list[bytes] = []

    def feed(self, chunk: bytes) -> None:
        """The next bytes."""
        self.sha256.update(chunk)
        if self._wants_crc32:
            self.crc32 = zlib.crc32(chunk, self.crc32)
        if not self._wants_md5:
            return
        rest = memoryview(chunk)
        while self._part_bytes is not None and self._in_part + len(rest) >= self._part_bytes:
            room = self._part_bytes - self._in_part
            self._part.update(rest[:room])
            self._parts.append(self._part.digest())
            self._part, self._in_part, rest = _md5(), 0, rest[room:]
        self._part.update(rest)
        self._in_part += len(rest)

    def md5(self) -> str:
        """Of all bytes, or over the MD5s of the parts."""
        if self._part_bytes is None:
            return self._part.hexdigest()
        last = [self._part.digest()] if self._in_part else []
        return hashlib.md5(b"".join([*self._parts, *last]), usedforsecurity=False).hexdigest()


def look_up(client: S3Client, bucket: str, key: str) -> Version:
    """The object's present version.

    Raises:
        StageError: what stores raise.
        NotFound: no such object.
    """
    with translated(f"s3://{bucket}/{key}"):
        head = head_object(client, bucket, key, ChecksumMode="ENABLED")
    etag, size = head["ETag"], head["ContentLength"]
    match = ETAG.fullmatch(etag) if etag_is_md5(head, bucket) else None
    part_bytes = None
    if match and match["parts"]:
        part_bytes = _part_bytes(client, bucket, key, etag, size, int(match["parts"]))
    md5 = match["md5"] if match and (part_bytes or not match["parts"]) else None
    sha256 = full_object(head, head.get("ChecksumSHA256"))
    crc32 = full_object(head, head.get("ChecksumCRC32"))
    return Version(
        etag, size, md5, part_bytes, sha256.hex() if sha256 else None, int.from_bytes(crc32) if crc32 else None
    )


def etag_is_md5(head: HeadObjectOutputTypeDef, bucket: str) -> bool:
    """Whether an ETag of that form says anything about the bytes."""
    plain = head.get("ServerSideEncryption") in (None, "AES256") and "SSECustomerAlgorithm" not in head
    return plain and not bucket.endswith("--x-s3")


def full_object(head: HeadObjectOutputTypeDef, value: str | None) -> bytes | None:
    """A checksum of the whole object; None for none, and for one over parts (``…-<N>``)."""
    if not value or "-" in value or head.get("ChecksumType") == "COMPOSITE":
        return None
    return base64.b64decode(value)


def _part_bytes(client: S3Client, bucket: str, key: str, etag: str, size: int, parts: int) -> int | None:
    """The size of the parts, if all but the last have the same; None where the store does not tell."""
    uri = f"s3://{bucket}/{key}"
    try:
        with translated(uri, but=ClientError):
            first = head_object(client, bucket, key, PartNumber=1, IfMatch=etag)["ContentLength"]
            if not first or math.ceil(size / first) != parts:
                return None
            last = head_object(client, bucket, key, PartNumber=parts, IfMatch=etag)["ContentLength"]
    except ClientError as error:
        named = translate(error, uri)
        if isinstance(named, StageError) and (
            named.reason is Reason.STORAGE_UNAVAILABLE or named.patience_seconds is not None
        ):
            raise named from error
        return None
    return first if last == size - first * (parts - 1) else None


def _md5() -> hashlib._Hash:
    return hashlib.md5(usedforsecurity=False)
