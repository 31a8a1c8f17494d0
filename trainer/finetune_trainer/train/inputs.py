"""What training starts from: prepared rows and the base model, both exactly as recorded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter

from finetune_api.failures import GPU_PATIENCE_SECONDS, Reason
from finetune_api.results import (
    PREPARE_RESULT,
    PREPARED_ADAPTER,
    PREPARED_BASE_TASK_PROMPTS,
    PREPARED_BASE_TASK_ROWS,
    PREPARED_HELD_OUT,
    PREPARED_PROMPTS,
    PREPARED_TASK_PROMPTS,
    PREPARED_TASK_ROWS,
    PREPARED_TRAIN,
    FileRecord,
    PreparedPrompt,
    PrepareResult,
    SourceFile,
)
from finetune_trainer.context import StageContext
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.hashing import hash_file, hash_files
from finetune_trainer.lora_files import WEIGHTS
from finetune_trainer.s3 import S3Store
from finetune_trainer.sources.cache import cache_of
from finetune_trainer.sources.model import ModelSource, resolve_model
from finetune_trainer.stored import read_stored
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)
PROMPTS = TypeAdapter(list[PreparedPrompt])
TASKS = (PREPARED_TASK_ROWS, PREPARED_TASK_PROMPTS)
BASE_TASKS = (PREPARED_BASE_TASK_ROWS, PREPARED_BASE_TASK_PROMPTS)


@dataclass(frozen=True)
class Prepared:
    """The prepare stage's files, here, checked."""

    result: PrepareResult
    train: Path
    held_out: Path
    prompts: list[PreparedPrompt]
    initial_adapter: Path | None = None
    """Weights that training goes on from."""
    tasks: tuple[Path, Path] | None = None
    """Rows and prompts of evaluation.tasks."""
    base_tasks: tuple[Path, Path] | None = None
    """Those for the base, as its own tokenizer reads them: with new tokens ``tasks`` are for the tuned model alone."""


def fetch_prepared(ctx: StageContext, workspace: S3Store) -> Prepared:
    """Download prepared data and check it against ``prepare/result.json``.

    Raises:
        StageError: VerificationFailed, if a file is not what prepare wrote or belongs to another snapshot.
    """
    return wait_until_available(ctx, lambda: _fetch_prepared(ctx, workspace), limit_seconds=GPU_PATIENCE_SECONDS)


def _fetch_prepared(ctx: StageContext, workspace: S3Store) -> Prepared:
    moved = ctx.reporter.transfer("download")
    try:
        result = read_stored(workspace, PREPARE_RESULT, PrepareResult)
    except NotFound as error:
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{workspace.uri(PREPARE_RESULT)} is missing: the prepare stage has not finished.",
        ) from error
    if result.snapshot_digest != ctx.snapshot.digest():
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{workspace.uri(PREPARE_RESULT)} was written for another configuration of this job.",
        )
    records = {f.path: f for f in result.files}
    paths = {}
    adapter = f"{PREPARED_ADAPTER}/{WEIGHTS}" if result.initial_adapter is not None else None
    of_tasks = [name for pair in (TASKS, BASE_TASKS) for name in pair if name in records]
    for name in (PREPARED_TRAIN, PREPARED_HELD_OUT, PREPARED_PROMPTS, *([adapter] if adapter else []), *of_tasks):
        paths[name] = ctx.work_dir / name
        if paths[name].is_file() and hash_file(paths[name], name, lambda: None) == records[name]:
            continue  # an earlier try, or process of this pod, has fetched it
        try:
            found = workspace.download_file(name, paths[name], moved)
        except NotFound as error:
            raise StageError(Reason.VERIFICATION_FAILED, f"{workspace.uri(name)} has disappeared.") from error
        must_equal(found, records[name], workspace.uri(name))
    prompts = PROMPTS.validate_json(paths[PREPARED_PROMPTS].read_bytes())
    initial = paths[adapter] if adapter else None
    tasks, base_tasks = ((paths[pair[0]], paths[pair[1]]) if pair[0] in paths else None for pair in (TASKS, BASE_TASKS))
    return Prepared(
        result, paths[PREPARED_TRAIN], paths[PREPARED_HELD_OUT], prompts, initial, tasks, base_tasks or tasks
    )


@dataclass(frozen=True)
class BaseFiles:
    """The base model's folder and the records of its files."""

    folder: Path
    files: list[FileRecord]


def fetch_base(
    ctx: StageContext, commit: str | None, expected: list[SourceFile], *, limit_seconds: float | None
) -> BaseFiles:
    """Download the base model at ``commit`` and hash every file of it.

    Args:
        expected: what an earlier stage knew of the files. They must agree with it as far as it goes: size, hash, version.

    Raises:
        StageError: VerificationFailed, if the base is not the expected one; what the model's source raises.
    """

    def fetch() -> tuple[BaseFiles, dict[str, str | None]]:
        source = resolve_model(ctx, commit)
        present = {f.path for f in source.list_files()}
        versions = {f.path: source.version(f.path) for f in expected if f.version and f.path in present}
        return bring(ctx, source), versions

    base, versions = wait_until_available(ctx, fetch, limit_seconds=limit_seconds)
    found = {f.path: f for f in base.files}
    for record in expected:
        if record.path not in found:
            raise StageError(Reason.VERIFICATION_FAILED, f"the base model has no {record.path} any more.")
        must_be_unchanged(
            found[record.path], versions.get(record.path), record, f"{ctx.snapshot.spec.model.uri}: {record.path}"
        )
    return base


def bring(ctx: StageContext, source: ModelSource) -> BaseFiles:
    """The model, hashed: out of the cache, if there is one that can hold it, else onto the pod's own disk."""
    names = [f.path for f in source.list_files()]
    moved = ctx.reporter.transfer("download", sum(f.size for f in source.list_files()))
    cache = cache_of(ctx)
    while cache is not None and (folder := cache.fetch(source, moved)) is not None:
        files = cache.hashed(folder, names)
        if files is not None:
            return BaseFiles(folder, files)
        log.warning("the model cache has other bytes of %s than were fetched into it", source.uri)
        if not cache.drop(folder):
            break
    folder = source.fetch(ctx.work_dir / "base", weights=True, on_bytes=moved)
    return BaseFiles(folder, hash_files(folder, names))


def must_be_unchanged(found: FileRecord, version: str | None, expected: SourceFile, what: str) -> None:
    """Raises VerificationFailed if anything differs that both stages know: hash, size, version."""
    if expected.sha256 is not None:
        must_equal(found, FileRecord(path=expected.path, size=expected.size, sha256=expected.sha256), what)
    before, now = (expected.size, expected.version), (found.size, version)
    if before[0] != now[0] or (None not in (expected.version, version) and expected.version != version):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{what} changed since the prepare stage: it had {before[0]} bytes and version {before[1]}, and has {now[0]} bytes and "
            f"version {now[1]} now.",
        )


def must_equal(found: FileRecord, expected: FileRecord, what: str) -> None:
    """Raises VerificationFailed if size or hash differ."""
    if (found.size, found.sha256) != (expected.size, expected.sha256):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{what} changed: found {found.size} bytes, SHA-256 {found.sha256[:16]}…; "
            f"expected {expected.size} bytes, {expected.sha256[:16]}….",
        )
