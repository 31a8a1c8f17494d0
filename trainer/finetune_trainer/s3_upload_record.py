"""What this pod knows of an upload: a line for a multipart upload that it began, then one for each part that the store took; and
in their place, once the object is whole, one line with what it was made of.

Lines, because the note of a 10,000 parts' upload is not written anew after each part; and because a process killed while it
writes leaves at most a torn last line, which is left out.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class FileIdentity:
    """What must be unchanged for parts of a file to be its parts still."""

    size: int
    mtime_ns: int
    inode: int

    @staticmethod
    def of(file: BinaryIO) -> FileIdentity:
        """Of an open file."""
        stat = os.fstat(file.fileno())
        return FileIdentity(stat.st_size, stat.st_mtime_ns, stat.st_ino)


@dataclass(frozen=True)
class SentPart:
    """A part that the store has: MD5 (hex) of the bytes, and the ETag that the store gave it."""

    number: int
    size: int
    md5: str
    etag: str


@dataclass(frozen=True)
class Finished:
    """An object that was sent whole: from which file, with which bytes, and the ETag that the store gave it."""

    file: FileIdentity
    sha256: str
    etag: str


class UploadRecord:
    """The note for one object. Without a disk to write it to, an upload works and cannot be gone on with."""

    def __init__(self, folder: Path, bucket: str, key: str) -> None:
        self._path = folder / f"{hashlib.sha256(f'{bucket}/{key}'.encode()).hexdigest()[:32]}.jsonl"
        self.upload_id = ""
        self.identity: FileIdentity | None = None
        self.part_bytes = 0
        self.parts: dict[int, SentPart] = {}

    def load(self) -> bool:
        """Read the note of an upload that is to be gone on with, if there is one."""
        lines = _lines(self._path)
        if not lines or "finished" in lines[0]:
            return False
        try:
            self.upload_id = lines[0]["uploadId"]
            self.identity = FileIdentity(**lines[0]["file"])
            self.part_bytes = lines[0]["partBytes"]
            self.parts = {line["number"]: SentPart(**line) for line in lines[1:]}
        except (KeyError, TypeError) as error:
            log.warning("%s is no note of an upload: %s", self._path, error)
            return False
        return True

    def begin(self, upload_id: str, identity: FileIdentity, part_bytes: int) -> None:
        """An upload exists from now on."""
        self.upload_id, self.identity, self.part_bytes, self.parts = upload_id, identity, part_bytes, {}
        self._write("w", {"uploadId": upload_id, "file": asdict(identity), "partBytes": part_bytes})

    def add(self, part: SentPart) -> None:
        """The store took a part."""
        self.parts[part.number] = part
        self._write("a", asdict(part))

    def finish(self, identity: FileIdentity, sha256: str, etag: str) -> None:
        """The object is there, whole."""
        self.upload_id = ""
        self._write("w", {"finished": asdict(Finished(identity, sha256, etag))})

    def finished(self) -> Finished | None:
        """What was sent whole, if nothing was begun since."""
        lines = _lines(self._path)
        if not lines or "finished" not in lines[0]:
            return None
        found = lines[0]["finished"]
        return Finished(FileIdentity(**found["file"]), found["sha256"], found["etag"])

    def forget(self) -> None:
        """The object was deleted: a note that it was sent is of no use any more."""
        if self.finished() is not None:
            self.remove()

    def remove(self) -> None:
        """The upload exists no more."""
        self.upload_id = ""
        self._path.unlink(missing_ok=True)

    @staticmethod
    def upload_ids(folder: Path) -> set[str]:
        """Of all uploads that this pod may go on with."""
        lines = [_lines(path) for path in folder.glob("*.jsonl")]
        return {str(found[0]["uploadId"]) for found in lines if found and "uploadId" in found[0]}

    def _write(self, mode: str, line: dict[str, Any]) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open(mode) as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            log.warning("an interrupted upload will begin anew: %s", error)


def _lines(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    try:
        text = path.read_text()
    except FileNotFoundError:
        return found
    for line in text.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            break  # torn: whoever wrote it was killed
    return found
