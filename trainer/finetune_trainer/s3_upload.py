"""A local file as an object, part by part, going on with the parts that an earlier call has sent."""

from __future__ import annotations

import hashlib
import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from botocore.exceptions import ClientError

from finetune_api.failures import Reason
from finetune_api.results import FileRecord
from finetune_trainer import s3_transfer
from finetune_trainer.errors import NotFound, StageError, waits
from finetune_trainer.parallel import Stopped
from finetune_trainer.s3_errors import error_code, translate, translated
from finetune_trainer.s3_read import head_object, in_time
from finetune_trainer.s3_transfer import MAX_PARTS, OnBytes, PacedBody, md5_base64, told
from finetune_trainer.s3_upload_record import FileIdentity, Finished, SentPart, UploadRecord

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from mypy_boto3_s3.type_defs import ListMultipartUploadsOutputTypeDef, ListPartsOutputTypeDef

log = logging.getLogger(__name__)

BEGINNINGS = 3
"""How often one call begins an upload whose parts the store has lost."""
LOST = {"NoSuchUpload", "InvalidPart", "InvalidPartOrder", "EntityTooSmall"}
"""What stores answer when the parts that they took are not there any more, wholly or in part."""


def upload(
    client: S3Client, bucket: str, key: str, name: str, path: Path, records: Path, on_bytes: OnBytes | None
) -> FileRecord:
    """Upload a file, hashing what is sent. What is waited for (see :mod:`finetune_trainer.waiting`) leaves the parts in the store
    and a note of them in ``records``; the next call with the same file goes on there. Other errors remove them. What is complete
    is noted too: of several files that are tried again together, only those that are missing are sent.

    Raises:
        StageError: StorageUnavailable, StorageFull, BucketNotFound, AccessDenied; Unknown for a file that changes meanwhile.
    """
    uri = f"s3://{bucket}/{key}"
    if path.stat().st_size <= s3_transfer.PART_BYTES:
        with path.open("rb") as file:
            size, sha256 = _put(client, bucket, key, file, UploadRecord(records, bucket, key))
        told(on_bytes, size)
        return FileRecord(path=name, size=size, sha256=sha256)
    for _ in range(BEGINNINGS):
        with path.open("rb") as file:
            transfer = _Multipart(client, bucket, key, file, records)
            try:
                return FileRecord(path=name, size=transfer.identity.size, sha256=transfer.run(on_bytes))
            except _PartsLost as lost:
                log.info("%s: the store has lost parts of the upload (%s): starting again", uri, lost)
    raise StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"{uri}: the store lost the parts of {BEGINNINGS} multipart uploads in a row; does something abort them?",
    )


def _put(client: S3Client, bucket: str, key: str, file: BinaryIO, record: UploadRecord) -> tuple[int, str]:
    """Size and SHA-256 of a small file, sent in one piece."""
    data = file.read()
    sha256, done = hashlib.sha256(data).hexdigest(), record.finished()
    if done is None or done.sha256 != sha256 or not _stands(client, bucket, key, len(data), done):
        with translated(f"s3://{bucket}/{key}"):
            answer = client.put_object(Bucket=bucket, Key=key, Body=PacedBody(data), ContentMD5=md5_base64(data))
        record.finish(FileIdentity.of(file), sha256, answer["ETag"])
    return len(data), sha256


def _stands(client: S3Client, bucket: str, key: str, size: int, done: Finished) -> bool:
    """Whether the object is still the one that was sent."""
    try:
        with translated(f"s3://{bucket}/{key}"):
            head = head_object(client, bucket, key)
    except NotFound:
        return False
    return (head["ContentLength"], head["ETag"].strip('"')) == (size, done.etag.strip('"'))


class _PartsLost(Exception):
    """The store does not know the upload, or a part of it, any more."""


class _Multipart:
    def __init__(self, client: S3Client, bucket: str, key: str, file: BinaryIO, records: Path) -> None:
        self._client, self._bucket, self._key, self._file = client, bucket, key, file
        self._uri = f"s3://{bucket}/{key}"
        self.identity = FileIdentity.of(file)
        self._part_bytes = max(s3_transfer.PART_BYTES, math.ceil(self.identity.size / MAX_PARTS))
        self._record = UploadRecord(records, bucket, key)
        self._counted = 0

    def run(self, on_bytes: OnBytes | None) -> str:
        """The file's SHA-256, once the object is there."""
        try:
            return self._run(on_bytes)
        except BaseException as error:
            if not waits(error) and not isinstance(error, Stopped):
                self._abandon()
            told(on_bytes, -self._counted)  # counted again by whoever goes on
            raise

    def _run(self, on_bytes: OnBytes | None) -> str:
        done = self._record.finished()
        if (
            done is not None
            and done.file == self.identity
            and _stands(self._client, self._bucket, self._key, self.identity.size, done)
        ):
            told(on_bytes, self.identity.size)
            return done.sha256
        known = self._go_on() or self._begin()
        sha256 = hashlib.sha256()
        parts: list[SentPart] = []
        while data := self._file.read(self._part_bytes):
            sha256.update(data)
            number, md5 = len(parts) + 1, hashlib.md5(data, usedforsecurity=False).hexdigest()
            sent = known.get(number)
            if sent is None or (sent.md5, sent.size) != (md5, len(data)):
                sent = self._send(number, md5, data)
            parts.append(sent)
            self._counted += len(data)
            told(on_bytes, len(data))
        if FileIdentity.of(self._file) != self.identity or sum(p.size for p in parts) != self.identity.size:
            raise StageError(Reason.UNKNOWN, f"{self._file.name} changed while it was uploaded to {self._uri}")
        etag = self._complete(parts)
        self._record.finish(self.identity, sha256.hexdigest(), etag)
        return sha256.hexdigest()

    def _begin(self) -> dict[int, SentPart]:
        with translated(self._uri):
            answer = self._client.create_multipart_upload(Bucket=self._bucket, Key=self._key)
        self._record.begin(answer["UploadId"], self.identity, self._part_bytes)
        return {}

    def _go_on(self) -> dict[int, SentPart] | None:
        """Parts in the store that an earlier call sent of this very file; None if there is no such upload."""
        if not self._record.load():
            return None
        if (self._record.identity, self._record.part_bytes) != (self.identity, self._part_bytes):
            self._abandon()
            return None
        try:
            listed = self._list_parts()
        except ClientError as error:
            named = translate(error, self._uri)
            if error_code(error) != "NoSuchUpload" and waits(named):
                raise named from error
            # NoSuchUpload: aborted by somebody, or completed and the answer was lost. Anything else: the store does not list, or does
            # not let us. In any case our own note holds the parts, and _complete finds out whether the store has them.
            listed = self._record.parts
        log.info("going on with the upload of %s after %d parts", self._uri, len(listed))
        return listed

    def _list_parts(self) -> dict[int, SentPart]:
        """An ETag that is not what the store answered to the part is taken for the part's MD5: if it is none, the part is sent anew."""
        found: dict[int, SentPart] = {}
        marker = 0
        while True:
            with translated(self._uri, but=ClientError):
                page = self._parts_after(marker)
            for part in page.get("Parts", []):
                number, etag, size = part["PartNumber"], part["ETag"], part["Size"]
                own = self._record.parts.get(number)
                md5 = own.md5 if own is not None and own.etag == etag else etag.strip('"')
                found[number] = SentPart(number, size, md5, etag)
            following = page.get("NextPartNumberMarker") or 0
            if not page.get("IsTruncated") or following <= marker:
                return found
            marker = following

    def _parts_after(self, marker: int) -> ListPartsOutputTypeDef:
        return in_time(
            self._uri,
            lambda: self._client.list_parts(
                Bucket=self._bucket, Key=self._key, UploadId=self._record.upload_id, PartNumberMarker=marker
            ),
        )

    def _send(self, number: int, md5: str, data: bytes) -> SentPart:
        try:
            with translated(self._uri, but=ClientError):
                answer = self._client.upload_part(
                    Bucket=self._bucket,
                    Key=self._key,
                    UploadId=self._record.upload_id,
                    PartNumber=number,
                    Body=PacedBody(data),
                    ContentMD5=md5_base64(data),
                )
        except ClientError as error:
            raise self._named(error) from error
        sent = SentPart(number, len(data), md5, answer["ETag"])
        self._record.add(sent)
        return sent

    def _complete(self, parts: list[SentPart]) -> str:
        """The object's ETag."""
        try:
            with translated(self._uri, but=ClientError):
                answer = self._client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._key,
                    UploadId=self._record.upload_id,
                    MultipartUpload={"Parts": [{"ETag": p.etag, "PartNumber": p.number} for p in parts]},
                )
        except (ClientError, StageError) as error:
            # The request may have been done and only its answer lost.
            etag = self._etag_of(parts)
            if etag is not None:
                log.info("%s is there, although completing it failed: %s", self._uri, error)
                return etag
            raise (self._named(error) if isinstance(error, ClientError) else error) from error
        return answer["ETag"]

    def _etag_of(self, parts: list[SentPart]) -> str | None:
        """The object's ETag if it consists of these parts: the MD5 over their MD5s. Where the store's ETags are none, nobody knows."""
        digest = hashlib.md5(b"".join(bytes.fromhex(p.md5) for p in parts), usedforsecurity=False).hexdigest()
        try:
            with translated(self._uri):
                head = head_object(self._client, self._bucket, self._key)
        except (StageError, NotFound):
            return None
        found, expected = (
            (head["ContentLength"], head["ETag"].strip('"')),
            (self.identity.size, f"{digest}-{len(parts)}"),
        )
        return head["ETag"] if found == expected else None

    def _named(self, error: ClientError) -> Exception:
        if error_code(error) in LOST:
            return _PartsLost(error_code(error))
        return translate(error, self._uri)

    def _abandon(self) -> None:
        """Orphaned parts cost money and are seen by nobody: try to remove them."""
        if not self._record.upload_id:
            return
        try:
            self._client.abort_multipart_upload(Bucket=self._bucket, Key=self._key, UploadId=self._record.upload_id)
        except Exception as error:  # noqa: BLE001 - the error that led here is the one to tell
            log.warning("parts of the upload of %s may be left behind: %s", self._uri, error)
        self._record.remove()


def abort_orphans(client: S3Client, bucket: str, folder: str, records: Path) -> int:
    """Remove multipart uploads below the key prefix ``folder`` that this pod has no note of; returns how many.

    An execution that was killed leaves them; they cost money, and no listing of objects shows them. A store that does not tell,
    or does not let us, costs a warning.

    Raises:
        StageError: StorageUnavailable and what else is waited for.
        ValueError: for a whole bucket, which belongs to others too.
    """
    uri = f"s3://{bucket}/{folder}"
    if not folder.strip("/"):
        raise ValueError(f"{uri}: uploads are removed below a folder only, not in a whole bucket")
    count = 0
    try:
        with translated(uri, but=ClientError):
            found = list(_uploads(client, bucket, folder))
            ours = UploadRecord.upload_ids(records)
            for key, upload_id in found:
                if upload_id in ours:
                    continue
                try:
                    client.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
                except ClientError as error:
                    if error_code(error) != "NoSuchUpload":
                        raise
                    continue  # it ended meanwhile
                count += 1
    except ClientError as error:
        named = translate(error, uri)
        if waits(named):
            raise named from error
        log.warning("uploads that a killed execution left below %s may stay: %s", uri, error)
    return count


def _uploads_after(
    client: S3Client, bucket: str, folder: str, markers: dict[str, Any]
) -> ListMultipartUploadsOutputTypeDef:
    return in_time(
        f"s3://{bucket}/{folder}", lambda: client.list_multipart_uploads(Bucket=bucket, Prefix=folder, **markers)
    )


def _uploads(client: S3Client, bucket: str, folder: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    key_marker, id_marker = "", ""
    while True:
        markers = {"KeyMarker": key_marker, "UploadIdMarker": id_marker}
        page = _uploads_after(client, bucket, folder, markers)
        found += [(u["Key"], u["UploadId"]) for u in page.get("Uploads", []) if u["Key"].startswith(folder)]
        # SeaweedFS 4.48 pages by UploadIdMarker alone, AWS by both.
        following = page.get("NextKeyMarker", ""), page.get("NextUploadIdMarker", "")
        if not page.get("IsTruncated") or following in ((key_marker, id_marker), ("", "")):
            return found
        key_marker, id_marker = following
