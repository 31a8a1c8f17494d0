"""SHA-256 of files."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from finetune_api.results import FileRecord
from finetune_trainer import heartbeat
from finetune_trainer.parallel import in_parallel

READ_BYTES = 4 << 20


def hash_files(folder: Path, names: list[str]) -> list[FileRecord]:
    """Size and SHA-256 of files, a few at a time (hashing releases the interpreter lock)."""
    return in_parallel(lambda name, check: hash_file(folder / name, name, check), sorted(names))


def hash_file(path: Path, name: str, check: Callable[[], None]) -> FileRecord:
    """Read a file once, in parts."""
    digest = hashlib.sha256()
    size = 0
    with path.open("rb") as file:
        while part := file.read(READ_BYTES):
            check()
            heartbeat.beat()
            digest.update(part)
            size += len(part)
    return FileRecord(path=name, size=size, sha256=digest.hexdigest())
