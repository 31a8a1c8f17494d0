"""An object as a local file: part by part, resumed, hashed, checked."""

from __future__ import annotations

import json
import logging
import re
import time
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, cast

from botocore.exceptions import ClientError
from urllib3.response import HTTPResponse

from finetune_api.failures import Reason
from finetune_api.results import FileRecord
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.s3_checksum import Hashes, Version, look_up
from finetune_trainer.s3_errors import BOTOCORE_ERRORS, http_status, translate
from finetune_trainer.s3_read import in_time
from finetune_trainer.s3_transfer import CHUNK_BYTES, IDLE_ATTEMPTS, OnBytes, Pace, TooSlow, told

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

log = logging.getLogger(__name__)

VERSIONS = 5
"""Versions of an object that are begun before a download is given up (and, by the caller, waited for)."""


def download(client: S3Client, bucket: str, key: str, name: str, path: Path, on_bytes: OnBytes | None) -> FileRecord:
    """Stream one version of an object to ``path``, continuing what an earlier call left in ``<path>.part``.

    Raises:
        StageError: StorageUnavailable after four attempts in a row without a byte, if no version lasts until it is read, or if the
            bytes are twice not those that the store names (see :mod:`finetune_trainer.s3_checksum`).
        NotFound: no such object.
    """
    uri = f"s3://{bucket}/{key}"
    path.parent.mkdir(parents=True, exist_ok=True)
    begun, wrong_before = 0, False
    while True:
        version = look_up(client, bucket, key)
        with PartialFile(path, f"{uri} {version.etag} {version.size}", version) as part:
            told(on_bytes, part.size)
            try:
                _fill(client, bucket, key, part, version, on_bytes)
            except Changed as change:
                told(on_bytes, -part.size)
                part.restart()
                begun += 1
                if begun >= VERSIONS:
                    raise StageError(
                        Reason.STORAGE_UNAVAILABLE,
                        f"{uri}: the store announced {version.size:,} bytes with ETag {version.etag} and answered {change} to a "
                        f"request for them, {begun} times in a row; is the object being written, or the store not S3-compatible?",
                    ) from change
                log.info("%s changed while it was read: starting again", uri)
                time.sleep(0.2 * 2**begun)
                continue
            except (StageError, NotFound):
                told(on_bytes, -part.size)  # counted again by whoever continues
                raise
            wrong = version.mismatch(part.hashes)
            if wrong is None:
                sha256 = part.hashes.sha256.hexdigest()
                part.finish()
                return FileRecord(path=name, size=version.size, sha256=sha256)
            told(on_bytes, -part.size)
            part.restart()
            if wrong_before:
                raise StageError(
                    Reason.STORAGE_UNAVAILABLE,
                    f"{uri} arrived twice with other bytes than the store has by its own word: {wrong}",
                )
            log.warning("%s arrived with other bytes than the store has: %s: reading again", uri, wrong)
            wrong_before = True


class Changed(Exception):
    """The object is another version by now: the store's answer to a request for this one."""


def _fill(
    client: S3Client, bucket: str, key: str, part: PartialFile, version: Version, on_bytes: OnBytes | None
) -> None:
    uri = f"s3://{bucket}/{key}"
    idle, pace = 0, Pace()
    while part.size < version.size:
        before = part.size
        try:
            _read_on(client, bucket, key, part, version, on_bytes, pace)
            pace.moved(0)
        except TooSlow as slow:
            raise StageError(
                Reason.STORAGE_UNAVAILABLE,
                f"reading {uri} all but stands still at {part.size:,} of {version.size:,} bytes: {slow}",
            ) from slow
        except BOTOCORE_ERRORS as error:
            status = http_status(error) if isinstance(error, ClientError) else None
            if status in (412, 416):
                raise Changed(f"{status} ({error})") from error
            named = translate(error, uri)
            if not (isinstance(named, StageError) and named.reason is Reason.STORAGE_UNAVAILABLE):
                raise named from error
            cause = type(error).__name__
        else:
            cause = "the store closed the connection"
        idle = idle + 1 if part.size <= before else 0
        if idle >= IDLE_ATTEMPTS:
            raise StageError(
                Reason.STORAGE_UNAVAILABLE, f"reading {uri} stopped at {part.size:,} of {version.size:,} bytes: {cause}"
            )
        if part.size < version.size:
            log.info("reading %s stopped at %s of %s bytes (%s): resuming", uri, part.size, version.size, cause)
            time.sleep(0.2 * 2**idle)


def _read_on(
    client: S3Client,
    bucket: str,
    key: str,
    part: PartialFile,
    version: Version,
    on_bytes: OnBytes | None,
    pace: Pace,
) -> None:
    """One request, for everything from where the file ends."""
    start, uri = part.size, f"s3://{bucket}/{key}"
    wanted = f"bytes={start}-{version.size - 1}"
    answer = in_time(uri, lambda: client.get_object(Bucket=bucket, Key=key, IfMatch=version.etag, Range=wanted))
    # Entered, botocore's body is urllib3's response. Its ``read`` waits for all bytes asked for: from a store that sends one in ten
    # seconds, four months for a megabyte, without any timeout; ``read1`` gives what has come.
    with cast(HTTPResponse, answer["Body"].__enter__()) as body:
        status = answer["ResponseMetadata"]["HTTPStatusCode"]
        if begins_at(status, answer.get("ContentRange"), start, version.size, uri) < start:
            told(on_bytes, -start)
            part.restart()
        while chunk := body.read1(min(CHUNK_BYTES, version.size - part.size)):
            part.append(chunk)
            told(on_bytes, len(chunk))
            pace.moved(len(chunk))


def begins_at(status: int, content_range: str | None, start: int, size: int, uri: str) -> int:
    """Where in the object an answer's bytes begin: at ``start`` as asked, or at 0 from a server that ignores ranges.

    Raises:
        StageError: StorageUnavailable, for any other place or another size.
    """
    if status == 200:
        return 0
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range or "")
    if status == 206 and match and int(match[1]) == start and match[2] in (str(size), "*"):
        return start
    raise StageError(
        Reason.STORAGE_UNAVAILABLE,
        f"{uri}: asked for bytes {start}-{size - 1} of {size}, the store answered {status} with Content-Range {content_range!r}",
    )


def _read_note(path: Path) -> str | None:
    """Which version a partial file is of; None where that was not noted, or was torn by a kill."""
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return note if isinstance(note, str) else None


class PartialFile:
    """``<path>.part`` beside a note of which version it belongs to. Survives a killed container."""

    def __init__(self, path: Path, note: str, version: Version) -> None:
        self._path = path
        self._version = version
        self._note = path.with_name(path.name + ".part.json")
        part = path.with_name(path.name + ".part")
        ours = part.exists() and _read_note(self._note) == note
        self._part = part
        self._file = part.open("r+b" if ours else "w+b")
        self._note.write_text(json.dumps(note))  # only now: a note beside another version's bytes would be believed
        self.size = 0
        self.hashes = Hashes(version)
        while chunk := self._file.read(CHUNK_BYTES):
            self._count(chunk)

    def append(self, chunk: bytes) -> None:
        """The next bytes."""
        self._file.write(chunk)
        self._count(chunk)

    def restart(self) -> None:
        """Forget everything."""
        self._file.seek(0)
        self._file.truncate()
        self.size = 0
        self.hashes = Hashes(self._version)

    def finish(self) -> None:
        """The file is whole: give it its name."""
        self._file.close()
        self._part.replace(self._path)
        self._note.unlink()

    def _count(self, chunk: bytes) -> None:
        self.size += len(chunk)
        self.hashes.feed(chunk)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
