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
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from finetune_api.failures import GPU_PATIENCE_SECONDS
from finetune_api.names import Stage
from finetune_api.results import FileRecord
from finetune_trainer import heartbeat
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
    errno.ESTALE,
    errno.EIO,
    errno.EAGAIN,
)
"""A volume that may not be written to, is full, broken or without locks, or whose lock somebody else has for too long."""
LOCK_PAUSE_SECONDS = 1.0
"""Between two tries to get a lock: another machine's cannot be waited on with a limit."""
LONGEST_WAIT_SECONDS = 3600.0
"""For another pod that fetches the same model and gets no farther. A stage that holds a GPU waits no longer than for anything else."""
_HELD: dict[Path, int] = {}
"""Locks of the entries that this process uses, until it ends."""


class ModelCache:
    """The volume, as one process of a stage sees it."""

    def __init__(self, root: Path, wait_seconds: float = LONGEST_WAIT_SECONDS) -> None:
        self._root = root
        self._wait_seconds = wait_seconds
        self._fresh: dict[Path, list[FileRecord]] = {}

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

    def holds(self, source: ModelSource) -> bool:
        """Whether a model is there; then it counts as used now."""
        folder = self._root / key_of(source)
        try:
            return folder.is_dir() and self._use(folder)
        except OSError as error:
            if error.errno not in UNUSABLE:
                raise
            log.warning("the model cache cannot be used: %s", error)
            return False

    def hashed(self, folder: Path, names: list[str]) -> list[FileRecord] | None:
        """The files as they are; None if they are not what was fetched. What this process has just fetched is not read again."""
        if folder in self._fresh:
            return self._fresh[folder]
        try:
            files = hash_files(folder, names)
        except FileNotFoundError:
            return None
        return files if files == self.records(folder) else None

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
            with self._locked(folder, fcntl.LOCK_EX):
                if not folder.is_dir() and not self._fill(folder, source, on_bytes):
                    return None
        return folder

    def _use(self, folder: Path) -> bool:
        """Hold an entry, if it is whole."""
        lock = self._lock(folder, fcntl.LOCK_SH)
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
        self._fresh[folder] = records
        return True

    def _lock(self, folder: Path, how: int) -> int:
        """
        Raises:
            BlockingIOError: somebody else has it for too long and gets no farther.
        """
        due, fetched = time.monotonic() + self._wait_seconds, 0
        while (lock := _held(_beside(folder, ".lock"), how | fcntl.LOCK_NB)) is None:
            if (now_fetched := _bytes_below(_beside(folder, ".part"))) > fetched:
                due, fetched = time.monotonic() + self._wait_seconds, now_fetched
            if time.monotonic() >= due:
                raise BlockingIOError(
                    errno.EAGAIN, f"another pod holds {folder.name} and got no farther for {self._wait_seconds:.0f} s"
                )
            heartbeat.beat()
            time.sleep(LOCK_PAUSE_SECONDS)
        return lock

    @contextmanager
    def _locked(self, folder: Path, how: int) -> Iterator[None]:
        lock = self._lock(folder, how)
        try:
            yield
        finally:
            os.close(lock)

    def _make_room(self, size: int, wanted: Path) -> bool:
        """Evict what was not used for the longest time, as far as nobody uses it."""
        if size > (1 - RESERVE) * shutil.disk_usage(self._root).total:
            return False
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
            for left in (_beside(folder, ".gone"), _beside(folder, ".part")):
                shutil.rmtree(left, ignore_errors=True)
            if folder.is_dir():
                log.info("%s leaves the model cache", folder.name)
                # No name of a whole entry may stand for half of one.
                folder.rename(_beside(folder, ".gone"))
                _beside(folder, ".json").unlink(missing_ok=True)
                shutil.rmtree(_beside(folder, ".gone"), ignore_errors=True)
        except OSError as error:
            log.warning("%s stays in the model cache: %s", folder.name, error)
            return False
        finally:
            os.close(lock)
        return True


def cache_of(ctx: StageContext) -> ModelCache | None:
    """Where jobs keep base models, if this one says so."""
    if ctx.snapshot.spec.model.cache is None:
        return None
    return ModelCache(ctx.cache_dir, GPU_PATIENCE_SECONDS if ctx.stage is Stage.TRAIN else LONGEST_WAIT_SECONDS)


def key_of(source: ModelSource) -> str:
    """The same for the same bytes from the same place."""
    files = [[f.path, f.size, f.sha256, source.version(f.path)] for f in source.list_files()]
    told = json.dumps([source.uri, source.commit, files])
    return hashlib.sha256(told.encode()).hexdigest()[:32]


def _beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(f"{folder.name}{suffix}")


def _bytes_below(part: Path) -> int:
    """What is fetched so far; files come and go while somebody does that."""
    total = 0
    for folder, _, names in os.walk(part):
        for name in names:
            with suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total


def _held(path: Path, how: int) -> int | None:
    """A lock, or None where somebody else has it."""
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
