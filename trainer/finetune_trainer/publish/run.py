"""The publish stage, top to bottom: check, score, merge, describe, write the manifest, clean up. Without a merge it never imports torch."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from pydantic import ValidationError

from finetune_api.names import Stage
from finetune_api.results import (
    ADAPTER_DIR,
    ANSWERS_FILE,
    ATTEMPTS_DIR,
    CHECKPOINTS_DIR,
    MANIFEST,
    MERGED_DIR,
    METRICS_FILE,
    MODEL_DIR,
    PREPARE_RESULT,
    PREPARED_PREVIEW,
    REPORT_FILE,
    ExecutionRecord,
    FileRecord,
    Manifest,
    PrepareResult,
    PublishReport,
    TrainResult,
)
from finetune_api.spec import Retention
from finetune_trainer.attempts import attempts, note_begin, read_notes
from finetune_trainer.context import StageContext
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.private import shareable_snapshot
from finetune_trainer.publish.card import model_card
from finetune_trainer.publish.report import html_report
from finetune_trainer.publish.scores import publish_scores
from finetune_trainer.publish.tasks import shortly
from finetune_trainer.publish.whole import check_tokenizer_hash, fetch_published, read_train_result
from finetune_trainer.s3 import S3Store
from finetune_trainer.stored import read_stored
from finetune_trainer.trackers.tracking import warning
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)
WORKSPACE_FOLDERS = ("prepare", "train", "publish", ATTEMPTS_DIR, CHECKPOINTS_DIR)


def run(ctx: StageContext) -> PublishReport:
    """Publish what was trained. ``manifest.json`` is written last: no manifest, no result.

    Raises:
        StageError: VerificationFailed, UnsupportedModel, and what stores raise.
    """
    output, workspace, done = wait_until_available(ctx, lambda: open_stores(ctx))
    if done is not None:
        log.info("this snapshot is published already: nothing to do")
        clean_up(ctx, output, workspace)
        return report(done)
    note_begin(ctx, workspace)
    for store in (output, workspace):
        wait_until_available(ctx, store.abort_orphans)

    # Check. A manifest that is not whole proves nothing, so it goes first.
    ctx.reporter.report(activity="Checking")
    wait_until_available(ctx, lambda: withdraw_manifest(output))
    trained = read_train_result(ctx, workspace)
    prepared = wait_until_available(ctx, lambda: read_stored(workspace, PREPARE_RESULT, PrepareResult))
    check_tokenizer_hash(prepared, trained)
    trained_folder = fetch_published(ctx, output, workspace, trained)

    # Score.
    ctx.reporter.report(activity="Scoring")
    scores, scores_file = publish_scores(ctx, prepared, trained, output, workspace)

    # Merge.
    files: list[FileRecord] = [*trained.adapter_files, *trained.report_files, scores_file]
    of_trackers = [warning(t) for t in trained.tracked if t.problem is not None]
    warnings: list[str] = [*prepared.warnings, *trained.warnings, *of_trackers, *scores.warnings]
    check = None
    if ctx.snapshot.spec.publishes_model:
        from finetune_trainer.publish import merged

        model = merged.make_merged(ctx, workspace, trained_folder, prepared, trained)
        check = model.check
        warnings += model.warnings
        (model.folder / "README.md").write_text(
            model_card(ctx.snapshot, prepared, trained, scores, output, check, warnings, merged=True), encoding="utf-8"
        )
        files += merged.upload_merged(ctx, model.folder, output)

    # Describe.
    if trained.weights is None:
        card = model_card(ctx.snapshot, prepared, trained, scores, output, check, warnings, merged=False).encode()
        files.append(wait_until_available(ctx, lambda: output.put_bytes(f"{ADAPTER_DIR}/README.md", card)))
    notes = wait_until_available(ctx, lambda: read_notes(workspace))
    manifest = make_manifest(ctx, prepared, trained, files, warnings, notes).model_copy(
        update={"merge_check": check, "text_metrics": scores.text, "judge": scores.judge, "tasks": scores.tasks}
    )
    page = wait_until_available(ctx, lambda: publish_page(ctx, manifest, trained, output, workspace))
    manifest = manifest.model_copy(update={"files": sorted([*manifest.files, page], key=lambda f: f.path)})
    wait_until_available(ctx, lambda: output.put_model(MANIFEST, manifest))
    clean_up(ctx, output, workspace)
    return report(manifest)


def open_stores(ctx: StageContext) -> tuple[S3Store, S3Store, Manifest | None]:
    """Output, workspace, and what an earlier execution finished.

    Opened anew at every try: the Secret may be missing still, or hold an endpoint that somebody mends.
    """
    output = ctx.output_store()
    return output, ctx.workspace_store(), finished_manifest(ctx, output)


def finished_manifest(ctx: StageContext, output: S3Store) -> Manifest | None:
    """The manifest of an earlier execution of this snapshot, if its files are all there."""
    try:
        manifest = read_stored(output, MANIFEST, Manifest)
        if manifest.snapshot_digest != ctx.snapshot.digest():
            return None
        whole = all(output.head(f.path).size == f.size for f in manifest.files)
    except (NotFound, ValidationError):
        return None
    return manifest if whole else None


def withdraw_manifest(output: S3Store) -> None:
    """Delete a manifest that is there. Asking for the deletion of none would need a right that many credentials lack on purpose."""
    if output.exists(MANIFEST):
        output.delete(MANIFEST)


def make_manifest(
    ctx: StageContext,
    prepared: PrepareResult,
    trained: TrainResult,
    files: list[FileRecord],
    warnings: list[str],
    notes: list[ExecutionRecord],
) -> Manifest:
    """Everything by which a result can be checked, compared and repeated."""
    snapshot = ctx.snapshot
    model = snapshot.spec.model
    executions = [
        (Stage.PREPARE, prepared.execution_id),
        (Stage.TRAIN, trained.execution_id),
        (Stage.PUBLISH, ctx.execution_id),
    ]
    completed = [ExecutionRecord(stage=stage, execution_id=name) for stage, name in executions if name is not None]
    return Manifest(
        job={"name": snapshot.job.name, "namespace": snapshot.job.namespace, "uid": snapshot.job.uid},
        base_model={"uri": model.uri, "revision": model.revision, "commit": prepared.model_commit},
        base_files=trained.base_files,
        initial_adapter=prepared.initial_adapter,
        weights=trained.weights,
        data_hash=prepared.data_hash,
        snapshot_digest=snapshot.digest(),
        config=shareable_snapshot(snapshot),
        metrics=trained.metrics,
        task_datasets=prepared.task_datasets,
        verification=trained.verification,
        data=prepared.data,
        plan=prepared.plan,
        versions=trained.versions,
        attempts=attempts(notes, completed),
        tracked=trained.tracked,
        warnings=warnings,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        files=sorted(files, key=lambda f: f.path),
    )


def publish_page(
    ctx: StageContext, manifest: Manifest, trained: TrainResult, output: S3Store, workspace: S3Store
) -> FileRecord:
    """``reports/index.html``."""
    metrics, answers = output.get_bytes(METRICS_FILE), output.get_bytes(ANSWERS_FILE)
    try:
        preview = workspace.get_bytes(PREPARED_PREVIEW)
    except NotFound:
        preview = b"[]"  # prepared by an image that made none
    page = html_report(ctx.snapshot, manifest, trained, metrics, answers, preview)
    return output.put_bytes(REPORT_FILE, page.encode(), content_type="text/html; charset=utf-8")


def clean_up(ctx: StageContext, output: S3Store, workspace: S3Store) -> None:
    """Delete the workspace, a copy of possibly private rows, and the checkpoints, each unless it is to be kept; and uploads that
    were never completed, which no later execution will look for. The result stands already, so this only warns."""
    keep_rows = ctx.snapshot.spec.output.workspace.retention is Retention.KEEP
    keep_checkpoints = ctx.snapshot.spec.recovery.checkpoint.retention is Retention.KEEP
    gone = [f for f in WORKSPACE_FOLDERS if not (keep_checkpoints if f == CHECKPOINTS_DIR else keep_rows)]
    try:
        for folder in gone if keep_rows or keep_checkpoints else [""]:
            workspace.delete_prefix(folder)
    except (StageError, NotFound) as error:
        log.warning("the workspace %s could not be deleted: %s", workspace.uri(), error)
    for store in (output, workspace):
        try:
            store.abort_orphans()
        except StageError as error:
            log.warning("uploads that were never completed may stay below %s: %s", store.uri(), error)


def report(manifest: Manifest) -> PublishReport:
    """What the operator needs of a manifest."""

    def size(folder: str) -> int:
        return sum(f.size for f in manifest.files if f.path.startswith(f"{folder}/"))

    return PublishReport(
        metrics=manifest.metrics,
        text_metrics=manifest.text_metrics,
        judge=manifest.judge,
        tasks=shortly(manifest.tasks),
        verification=manifest.verification,
        merge_check=manifest.merge_check,
        adapter_bytes=size(ADAPTER_DIR),
        merged_bytes=size(MERGED_DIR) or None,
        model_bytes=size(MODEL_DIR) or None,
        files=len(manifest.files),
        warnings=manifest.warnings,
    )
