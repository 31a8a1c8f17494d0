"""The combine stage, top to bottom: fetch, check, combine, upload, read back and measure, write the manifest."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from finetune_api.combination import CombinationError, CombinationManifest, CombineReport
from finetune_api.failures import Reason
from finetune_api.results import ADAPTER_DIR, MANIFEST, FileRecord
from finetune_trainer.combine.card import lineage, model_card
from finetune_trainer.combine.files import modules_of, result_rank, write_config, write_weights
from finetune_trainer.combine.measure import measure
from finetune_trainer.combine.methods import SUMS
from finetune_trainer.combine.sources import fetch_adapter, must_go_together, shared_tokenizer
from finetune_trainer.context import CombineContext
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.lora_files import CONFIG, WEIGHTS
from finetune_trainer.private import shareable
from finetune_trainer.publish.adapter import read_adapter
from finetune_trainer.s3 import S3Store
from finetune_trainer.stored import read_stored
from finetune_trainer.train.versions import library_versions
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)
T = TypeVar("T")
PATIENCE_SECONDS = 60.0
"""How long the pod waits for what somebody can mend. It posts no progress: what is missing is known when it has ended, and then another follows."""


def run(ctx: CombineContext) -> CombineReport:
    """Combine. ``manifest.json`` is written last: no manifest, no result.

    Raises:
        StageError: InvalidConfig, ModelNotFound, VerificationFailed, and what sources and stores raise.
    """
    spec = ctx.snapshot.spec
    output, done = _patiently(ctx, lambda: open_output(ctx))
    if done is not None:
        log.info("this combination is published already: nothing to do")
        return report(done)
    _patiently(ctx, output.abort_orphans)

    # Fetch and check.
    sources = [_patiently(ctx, lambda i=i: fetch_adapter(ctx, i)) for i in range(len(spec.adapters))]  # type: ignore[misc]
    must_go_together(sources, same_ranks=spec.type not in SUMS)
    tokenizer = shared_tokenizer(sources)
    warnings = [] if tokenizer is not None else ["The adapters' tokenizers differ, so none stands beside the result."]

    # Combine.
    folder = ctx.work_dir / "combined"
    folder.mkdir(exist_ok=True)
    rank = result_rank(spec, sources)
    log.info("%s: %d adapters, %d modules, rank %d", spec.type, len(sources), len(modules_of(sources)), rank)
    write_config(sources, rank, folder)
    weights, left_out = write_weights(spec, sources, rank, folder)
    for file in tokenizer or ():
        shutil.copyfile(sources[0].adapter.folder / file.path, folder / file.path)

    # Upload, read back, measure.
    _patiently(ctx, lambda: withdraw(output))
    files = _patiently(ctx, lambda: output.upload_dir(folder, ADAPTER_DIR))
    must_be_stored(weights, files)
    back = _patiently(ctx, lambda: read_back(output, files, ctx.work_dir / "back"))
    error = measure(spec, read_adapter(back), sources, rank, left_out)

    # Describe.
    adapters = [lineage(source) for source in sources]
    card = model_card(ctx.snapshot, sources[0].base, adapters, rank, error, output, bool(tokenizer)).encode()
    files.append(_patiently(ctx, lambda: output.put_bytes(f"{ADAPTER_DIR}/README.md", card)))
    job = ctx.snapshot.job
    manifest = CombinationManifest(
        combination={"name": job.name, "namespace": job.namespace, "uid": job.uid},
        base_model=sources[0].base,
        adapters=adapters,
        type=spec.type,
        rank=rank,
        modules=len(modules_of(sources)),
        relative_error=error,
        snapshot_digest=ctx.snapshot.digest(),
        config=shareable(spec),
        versions=library_versions(),
        warnings=warnings,
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        files=sorted(files, key=lambda f: f.path),
    )
    _patiently(ctx, lambda: output.put_model(MANIFEST, manifest))
    return report(manifest)


def _patiently(ctx: CombineContext, fn: Callable[[], T]) -> T:
    return wait_until_available(ctx, fn, limit_seconds=PATIENCE_SECONDS)


def open_output(ctx: CombineContext) -> tuple[S3Store, CombinationManifest | None]:
    """The output, and what an earlier execution finished. Opened anew at every try: the Secret may be missing still."""
    output = ctx.output_store()
    try:
        manifest = read_stored(output, MANIFEST, CombinationManifest)
        whole = all(output.head(f.path).size == f.size for f in manifest.files)
    except (NotFound, ValidationError):
        output.check_bucket()
        return output, None
    return output, manifest if whole and manifest.snapshot_digest == ctx.snapshot.digest() else None


def withdraw(output: S3Store) -> None:
    """Take away what an earlier execution left, the manifest first. Asking for the deletion of none would need a right that many credentials lack on purpose."""
    if output.exists(MANIFEST):
        output.delete(MANIFEST)
    output.clear(ADAPTER_DIR)


def must_be_stored(weights: FileRecord, files: list[FileRecord]) -> None:
    """What was uploaded is what was written.

    Raises:
        StageError: VerificationFailed.
    """
    stored = next(f for f in files if f.path == f"{ADAPTER_DIR}/{WEIGHTS}")
    if (stored.size, stored.sha256) != (weights.size, weights.sha256):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{WEIGHTS} was written with SHA-256 {weights.sha256} and read from disk with {stored.sha256}.",
        )


def read_back(output: S3Store, files: list[FileRecord], folder: Path) -> Path:
    """The adapter as it lies in the bucket.

    Raises:
        StageError: VerificationFailed for other bytes than were sent.
    """
    sent = {f.path: f.sha256 for f in files}
    for name in (CONFIG, WEIGHTS):
        key = f"{ADAPTER_DIR}/{name}"
        if (got := output.download_file(key, folder / name)).sha256 != sent[key]:
            raise StageError(
                Reason.VERIFICATION_FAILED,
                f"{output.uri(key)} has SHA-256 {got.sha256}; what was sent has {sent[key]}.",
            )
    return folder


def report(manifest: CombinationManifest) -> CombineReport:
    """What the operator needs of a manifest."""
    weights = next(f for f in manifest.files if f.path == f"{ADAPTER_DIR}/{WEIGHTS}")
    error: CombinationError = manifest.relative_error
    return CombineReport(
        base_model=manifest.base_model,
        rank=manifest.rank,
        modules=manifest.modules,
        relative_error=error.whole,
        exact=error.tolerance is not None,
        adapter_bytes=sum(f.size for f in manifest.files),
        adapter_sha256=weights.sha256,
        warnings=manifest.warnings,
    )
