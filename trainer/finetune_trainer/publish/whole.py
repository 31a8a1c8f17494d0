"""Are the adapter and the reports in the bucket what the train stage wrote? Runs without torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from finetune_api.failures import Reason
from finetune_api.results import ADAPTER_DIR, TRAIN_RESULT, WEIGHTS_DIR, FileRecord, PrepareResult, TrainResult
from finetune_trainer.context import StageContext
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.s3 import S3Store
from finetune_trainer.s3_transfer import OnBytes
from finetune_trainer.stored import read_stored
from finetune_trainer.train.inputs import must_equal
from finetune_trainer.waiting import wait_until_available


def read_train_result(ctx: StageContext, workspace: S3Store) -> TrainResult:
    """``train/result.json`` of this snapshot.

    Raises:
        StageError: VerificationFailed.
    """
    try:
        result = wait_until_available(ctx, lambda: read_stored(workspace, TRAIN_RESULT, TrainResult))
    except NotFound as error:
        raise StageError(
            Reason.VERIFICATION_FAILED, f"{workspace.uri(TRAIN_RESULT)} is missing: the train stage has not finished."
        ) from error
    if result.snapshot_digest != ctx.snapshot.digest():
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{workspace.uri(TRAIN_RESULT)} was written for another configuration of this job.",
        )
    return result


def check_tokenizer_hash(prepared: PrepareResult, trained: TrainResult) -> None:
    """Raises VerificationFailed if training used another tokenizer or chat template than prepare."""
    if trained.tokenizer_hash not in (None, prepared.tokenizer_hash):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"training used another tokenizer or chat template (hash {str(trained.tokenizer_hash)[:16]}…) than the data were "
            f"prepared with ({prepared.tokenizer_hash[:16]}…).",
        )


def fetch_published(ctx: StageContext, output: S3Store, workspace: S3Store, result: TrainResult) -> Path:
    """Read every file that training stored back and compare it with its record; returns the local folder of the adapter, or of the trained
    weights.

    Raises:
        StageError: VerificationFailed.
    """
    stored = [(output, f) for f in (*result.adapter_files, *result.report_files)]
    stored += [(workspace, f) for f in result.weights_files]
    moved = ctx.reporter.transfer("download", sum(f.size for _, f in stored))
    for store, record in stored:
        path = ctx.work_dir / "published" / record.path
        found = wait_until_available(ctx, partial(fetch_stored, store, record, path, moved))
        must_equal(found, record, store.uri(record.path))
    return ctx.work_dir / "published" / (ADAPTER_DIR if result.weights is None else WEIGHTS_DIR)


def fetch_stored(store: S3Store, record: FileRecord, path: Path, moved: OnBytes | None = None) -> FileRecord:
    """A file that an earlier stage stored.

    Raises:
        StageError: VerificationFailed, if it is gone.
    """
    try:
        return store.download_file(record.path, path, moved)
    except NotFound as error:
        raise StageError(
            Reason.VERIFICATION_FAILED, f"{store.uri(record.path)} has disappeared since training."
        ) from error
