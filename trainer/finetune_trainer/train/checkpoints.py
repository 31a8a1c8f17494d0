"""Checkpoints in the workspace: written with their marker last, checked when read, and no more kept than asked for.

The newest one also stays on the pod's disk, where a restart in the same pod finds it without the store.
"""

from __future__ import annotations

import fcntl
import logging
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from finetune_api.failures import Reason
from finetune_api.progress import Split
from finetune_api.results import CHECKPOINT_MARKER, CHECKPOINT_VERSION, CHECKPOINTS_DIR, CheckpointMarker, FileRecord
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.hashing import hash_file, hash_files
from finetune_trainer.s3 import S3Store
from finetune_trainer.s3_transfer import OnBytes
from finetune_trainer.stored import refuse_newer, version_of
from finetune_trainer.train.capture import Captured, write_files
from finetune_trainer.train.inputs import must_equal
from finetune_trainer.train.owner import Owner

log = logging.getLogger(__name__)
LOCK_FILE = "lock"


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is complete."""

    marker: CheckpointMarker
    seconds: float = 0.0
    """From the beginning of its writing to its marker."""

    @property
    def name(self) -> str:
        """Its folder."""
        return folder_name(self.marker.step, self.marker.execution_id)


@dataclass(frozen=True)
class Restored:
    """A checkpoint on this machine's disk, every file checked."""

    marker: CheckpointMarker
    folder: Path


@dataclass
class Checkpoints:
    """The checkpoints of one job, as one execution sees and writes them."""

    workspace: S3Store
    local: Path
    owner: Owner
    snapshot_digest: str
    split: Split
    total_steps: int
    keep: int
    world_size: int = 1
    shared: bool = False
    """Ranks on other nodes need them, too: what only this pod's disk has cannot be gone on from."""
    known: dict[str, CheckpointMarker] = field(default_factory=dict)
    """By folder name."""
    _found: set[str] = field(default_factory=set)
    """Folders in the bucket when this execution began."""
    _uploading: str = ""

    def save(self, captured: Captured, on_bytes: OnBytes | None = None) -> Saved:
        """Write, upload, complete; then delete what is not kept. Tried again, it goes on where it was.

        Raises:
            StageError: what the store raises; Superseded.
        """
        began = time.monotonic()
        self._uploading = folder_name(captured.step, self.owner.execution_id)
        self._complete(self.save_locally(captured), on_bytes)
        marker = self.known[self._uploading]
        saved = Saved(marker, time.monotonic() - began)
        try:
            self.prune()
        except (StageError, NotFound) as error:
            log.warning("old checkpoints stay for now: %s", error)
        return saved

    def measured(self, restored: Restored, held_out_loss: float) -> None:
        """The held-out loss at a checkpoint that was saved without one.

        Raises:
            StageError: what the store raises; Superseded.
        """
        marker = restored.marker.model_copy(update={"held_out_loss": held_out_loss})
        self._note(restored.folder.name, marker)
        self._complete(Restored(marker, restored.folder), None)

    def _complete(self, local: Restored, on_bytes: OnBytes | None) -> None:
        prefix = f"{CHECKPOINTS_DIR}/{local.folder.name}"
        self.owner.check()
        uploaded = self.workspace.upload_dir(local.folder, prefix, on_bytes)
        sent = {f.path.removeprefix(f"{prefix}/"): f for f in uploaded}
        for record in local.marker.files:
            must_equal(sent[record.path], record, self.workspace.uri(f"{prefix}/{record.path}"))
        self.owner.check()
        self.workspace.put_model(f"{prefix}/{CHECKPOINT_MARKER}", local.marker)
        self.known[local.folder.name] = local.marker

    def save_locally(self, captured: Captured) -> Restored:
        """On the pod's disk only, with its marker beside the folder; older ones go. One process or thread of the pod at a time; what
        is there already of this step is not written again."""
        name = folder_name(captured.step, self.owner.execution_id)
        folder = self.local / name
        with locked(self.local / LOCK_FILE):
            marker = self._local_markers().get(name)
            if marker is None or not folder.is_dir() or not self._whole(folder, marker.files):
                marker = self._write(captured, folder)
            if captured.held_out_loss is not None:
                marker = marker.model_copy(update={"held_out_loss": captured.held_out_loss})
            self._note(name, marker)
            for old in self.local.iterdir():
                if old.is_dir() and old.name not in (name, self._uploading):
                    self._local_marker(old.name).unlink(missing_ok=True)
                    shutil.rmtree(old)
        return Restored(marker, folder)

    def _write(self, captured: Captured, folder: Path) -> CheckpointMarker:
        shutil.rmtree(folder, ignore_errors=True)
        self._local_marker(folder.name).unlink(missing_ok=True)
        write_files(captured, folder)
        return CheckpointMarker(
            snapshot_digest=self.snapshot_digest,
            execution_id=self.owner.execution_id,
            execution_number=self.owner.number,
            step=captured.step,
            total_steps=self.total_steps,
            split=self.split,
            world_size=self.world_size,
            held_out_loss=captured.held_out_loss,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            files=hash_files(folder, [p.name for p in folder.iterdir()]),
        )

    def newest(self) -> Restored | None:
        """The newest checkpoint that is whole, here. What is torn or corrupt is named in the log and passed over."""
        self._read_markers()
        candidates = {**({} if self.shared else self._local_markers()), **self.known}
        for name, marker in sorted(candidates.items(), key=lambda item: _age(item[1]), reverse=True):
            restored = self.restore(name, marker)
            if restored is not None:
                return restored
        return None

    def best(self) -> CheckpointMarker | None:
        """The one with the lowest held-out loss, the earliest of equals."""
        return best_of(self.known.values())

    def restore(self, name: str, marker: CheckpointMarker) -> Restored | None:
        """A checkpoint's files, checked, on this disk; None if it is not whole: then it counts for nothing any more.

        Raises:
            StageError: what the store raises; called again, it goes on with what is here.
        """
        folder = self.local / name
        if folder.is_dir() and self._whole(folder, marker.files):
            return Restored(marker, folder)
        self._local_marker(name).unlink(missing_ok=True)
        wrong = self._fetch(name, marker, folder)
        if wrong is not None:
            log.warning("checkpoint %s is passed over: %s", name, wrong)
            self.known.pop(name, None)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        self._note(name, marker)
        return Restored(marker, folder)

    def _fetch(self, name: str, marker: CheckpointMarker, folder: Path) -> str | None:
        """Download what is not here yet; what is wrong with the checkpoint, or None."""
        try:
            for record in marker.files:
                path, key = folder / record.path, f"{CHECKPOINTS_DIR}/{name}/{record.path}"
                if not path.is_file() or hash_file(path, record.path, lambda: None) != record:
                    found = self.workspace.download_file(key, path)
                    must_equal(found.model_copy(update={"path": record.path}), record, self.workspace.uri(key))
        except NotFound as error:
            return str(error)
        except StageError as error:
            if error.reason is not Reason.VERIFICATION_FAILED:
                raise
            return error.message
        return None

    def prune(self) -> None:
        """Keep the newest ``keep`` and the best; what else lies there goes, torn ones of earlier executions too. Markers go first.

        A folder that was not there when this execution began and is not its own is a later one's. Credentials that may not delete
        cost only room.

        Raises:
            StageError: what the store raises; Superseded.
        """
        keep = kept(self.known, self.keep)
        here = {info.key.split("/")[1] for info in self.workspace.list(CHECKPOINTS_DIR)}
        ours = {n for n in here if n in self._found or n.endswith(f"-{self.owner.execution_id}")}
        if ours - keep:
            self.owner.check()
        for name in sorted(ours - keep):
            try:
                self.workspace.delete(f"{CHECKPOINTS_DIR}/{name}/{CHECKPOINT_MARKER}")
                self.workspace.delete_prefix(f"{CHECKPOINTS_DIR}/{name}")
            except StageError as error:
                if error.reason is not Reason.ACCESS_DENIED:
                    raise
                log.warning("the old checkpoint %s stays: %s", name, error.message)
            self.known.pop(name, None)

    def _read_markers(self) -> None:
        self.known, self._found = {}, set()
        for info in list(self.workspace.list(CHECKPOINTS_DIR)):
            name, _, file = info.key.removeprefix(f"{CHECKPOINTS_DIR}/").partition("/")
            self._found.add(name)
            if file != CHECKPOINT_MARKER:
                continue
            try:
                data = self.workspace.get_bytes(info.key)
                refuse_newer(self.workspace.uri(info.key), version_of(data), CHECKPOINT_VERSION)
                marker = CheckpointMarker.model_validate_json(data)
            except (NotFound, ValidationError) as error:
                log.warning("checkpoint %s is passed over: its marker cannot be read: %s", name, error)
                continue
            if self._ours(name, marker):
                self.known[name] = marker

    def _local_markers(self) -> dict[str, CheckpointMarker]:
        found = {}
        for path in self.local.glob("*.json"):
            try:
                marker = CheckpointMarker.model_validate_json(path.read_bytes())
            except (OSError, ValidationError) as error:
                log.warning("%s is passed over: %s", path, error)
                continue
            if self._ours(path.stem, marker):
                found[path.stem] = marker
        return found

    def _ours(self, name: str, marker: CheckpointMarker) -> bool:
        ours = marker.snapshot_digest == self.snapshot_digest and name == folder_name(marker.step, marker.execution_id)
        if not ours:
            log.warning("checkpoint %s is passed over: it belongs to another configuration of this job", name)
        return ours

    def _whole(self, folder: Path, records: Iterable[FileRecord]) -> bool:
        wanted = {r.path: r for r in records}
        present = sorted(p.name for p in folder.iterdir())
        return present == sorted(wanted) and all(f == wanted[f.path] for f in hash_files(folder, present))

    def _note(self, name: str, marker: CheckpointMarker) -> None:
        self._local_marker(name).write_text(marker.model_dump_json(by_alias=True))

    def _local_marker(self, name: str) -> Path:
        self.local.mkdir(parents=True, exist_ok=True)
        return self.local / f"{name}.json"


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process, or thread, of the pod at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def folder_name(step: int, execution_id: str) -> str:
    """Sorts by step; two executions never write to one folder."""
    return f"{step:08d}-{execution_id}"


def kept(known: dict[str, CheckpointMarker], keep: int) -> set[str]:
    """Names of the newest ``keep`` checkpoints and of the best."""
    newest = sorted(known, key=lambda name: _age(known[name]), reverse=True)[:keep]
    best = best_of(known.values())
    return {*newest, *({folder_name(best.step, best.execution_id)} if best else ())}


def best_of(markers: Iterable[CheckpointMarker]) -> CheckpointMarker | None:
    """The lowest held-out loss, the earliest of equals."""
    measured = [m for m in markers if m.held_out_loss is not None]
    return min(measured, key=lambda m: (m.held_out_loss, m.step), default=None)


def _age(marker: CheckpointMarker) -> tuple[int, int]:
    return (marker.step, marker.execution_number)
