"""Base models on a volume that jobs share: fetched once, used where they lie.

::

    <key>/        a model's files; the folder is renamed into place when all are there
    <key>.json    their records, written before that
    <key>.lock    held (flock) shared by whoever uses the model, exclusively by whoever fetches or evicts it; its mtime is the last use
    <key>.part/   what is being fetched, or was when somebody died: whoever comes next goes on there

The key is a hash of where the model is and what its source tells of each file, so a changed model is another entry, and a
job sees an entry only if its own credentials may list the model. A lock goes with the process that holds it, however that ends.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from finetune_api.results import FileRecord
from finetune_trainer.context import StageContext
from finetune_trainer.hashing import hash_files
from finetune_trainer.s3_transfer import OnBytes
from finetune_trainer.sources.model import ModelSource

log = logging.getLogger(__name__)
RECORDS = TypeAdapter(list[FileRecord])
RESERVE = 0.05
"""Of the volume, that stays free."""
UNUSABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOLCK,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
)
"""A volume that may not be written to, is full, or has no locks."""
_HELD: dict[Path, int] = {}
"""Locks of the entries that this process uses, until it ends."""


class ModelCache:
    """The volume, as one process of a stage sees it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def fetch(self, source: ModelSource, on_bytes: OnBytes | None = None) -> Path | None:
        """The folder with all files of a model, fetched if it is not there; None if the volume cannot take it. It stays as long as this
        process lives.

        Raises:
            StageError: what the source raises.
        """
        try:
            return self._fetch(source, on_bytes)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            log.warning("the model cache cannot be used: %s", error)
            return None

    def records(self, folder: Path) -> list[FileRecord] | None:
        """What was fetched, as it was then."""
        try:
            return RECORDS.validate_json(_beside(folder, ".json").read_bytes())
        except (OSError, ValidationError):
            return None

    def drop(self, folder: Path) -> bool:
        """Remove an entry that is not what was fetched; False if others use it."""
        self._release(folder)
        return self._evict(folder)

    def _fetch(self, source: ModelSource, on_bytes: OnBytes | None) -> Path | None:
        folder = self._root / key_of(source)
        while not self._use(folder):
            with _locked(_beside(folder, ".lock"), fcntl.LOCK_EX):
                if not folder.is_dir() and not self._fill(folder, source, on_bytes):
                    return None
        return folder

    def _use(self, folder: Path) -> bool:
        """Hold an entry, if it is whole."""
        lock = _held(_beside(folder, ".lock"), fcntl.LOCK_SH)
        assert lock is not None
        if not folder.is_dir():
            os.close(lock)
            return False
        os.utime(lock)
        self._release(folder)
        _HELD[folder] = lock
        return True

    def _release(self, folder: Path) -> None:
        lock = _HELD.pop(folder, None)
        if lock is not None:
            os.close(lock)

    def _fill(self, folder: Path, source: ModelSource, on_bytes: OnBytes | None) -> bool:
        part = _beside(folder, ".part")
        files = source.list_files()
        missing = sum(f.size for f in files) - sum(p.stat().st_size for p in part.glob("*") if p.is_file())
        if not self._make_room(missing, folder):
            log.warning("the model cache has no room for %s, and all that it holds is in use", source.uri)
            return False
        log.info("fetching %s into the model cache", source.uri)
        source.fetch(part, weights=True, on_bytes=on_bytes)
        records = hash_files(part, [f.path for f in files])
        _beside(folder, ".json").write_bytes(RECORDS.dump_json(records, by_alias=True))
        part.rename(folder)
        return True

    def _make_room(self, size: int, wanted: Path) -> bool:
        """Evict what was not used for the longest time, as far as nobody uses it."""
        for old in [None, *self._by_last_use(wanted)]:
            if old is not None:
                self._evict(old)
            usage = shutil.disk_usage(self._root)
            if usage.free - RESERVE * usage.total >= size:
                return True
        return False

    def _by_last_use(self, wanted: Path) -> list[Path]:
        locks = [p for p in self._root.glob("*.lock") if p.stem != wanted.name]
        return [self._root / p.stem for p in sorted(locks, key=lambda p: p.stat().st_mtime)]

    def _evict(self, folder: Path) -> bool:
        lock = _held(_beside(folder, ".lock"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        if lock is None:
            return False
        try:
            if folder.is_dir():
                log.info("%s leaves the model cache", folder.name)
                # No name of a whole entry may stand for half of one.
                folder.rename(_beside(folder, ".gone"))
            for left in (_beside(folder, ".gone"), _beside(folder, ".part")):
                shutil.rmtree(left, ignore_errors=True)
            _beside(folder, ".json").unlink(missing_ok=True)
        finally:
            os.close(lock)
        return True


def cache_of(ctx: StageContext) -> ModelCache | None:
    """Where jobs keep base models, if this one says so."""
    return ModelCache(ctx.cache_dir) if ctx.snapshot.spec.model.cache is not None else None


def key_of(source: ModelSource) -> str:
    """The same for the same bytes from the same place."""
    files = [[f.path, f.size, f.sha256, source.version(f.path)] for f in source.list_files()]
    told = json.dumps([source.uri, source.commit, files])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}{suffix}")


def _held(path: Path, how: int) -> int | None:
    """A lock, or None where somebody else has it and ``how`` says not to wait."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o664)
    try:
        fcntl.flock(file, how)
    except BlockingIOError:
        os.close(file)
        return None
    except BaseException:
        os.close(file)
        raise
    return file


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    lock = _held(path, how)
    assert lock is not None
    try:
        yield
    finally:
        os.close(lock)
