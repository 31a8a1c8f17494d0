"""The merged model, or with method Full the model that is the result: fetch the base, merge, check, upload. The only part of publish that needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoTokenizer

from finetune_api.failures import Reason
from finetune_api.results import (
    MERGED_DIR,
    MODEL_DIR,
    PREPARED_HELD_OUT,
    FileRecord,
    MergeCheck,
    PrepareResult,
    QuantizedModule,
    SourceFile,
    TrainResult,
    chosen,
)
from finetune_api.spec import MergedBase
from finetune_trainer.context import StageContext
from finetune_trainer.errors import NotFound, StageError
from finetune_trainer.prepare.trained_tokens import is_tied
from finetune_trainer.publish.adapter import in_files, read_adapter, read_weights
from finetune_trainer.publish.check import lost_in_rounding, merge_check
from finetune_trainer.publish.merge import BaseWeights, merge, write_companions
from finetune_trainer.publish.round_trip import RoundTrip
from finetune_trainer.publish.safetensors_stream import Checkpoint, module_of
from finetune_trainer.publish.stored_weights import StoredWeights, empty_model
from finetune_trainer.publish.tokens import must_train, with_shared_head
from finetune_trainer.publish.written import check_written
from finetune_trainer.s3 import S3Store
from finetune_trainer.train.device import use_all_cpus
from finetune_trainer.train.evaluate import pad_token_id
from finetune_trainer.train.inputs import fetch_base, must_equal
from finetune_trainer.train.rows import Rows, read_rows
from finetune_trainer.waiting import wait_until_available


@dataclass(frozen=True)
class MergedModel:
    """The merged folder, here, checked."""

    folder: Path
    check: MergeCheck
    warnings: list[str]


def make_merged(
    ctx: StageContext, workspace: S3Store, adapter_folder: Path, prepared: PrepareResult, trained: TrainResult
) -> MergedModel:
    """Merge the adapter, or put the trained weights, into the same base files that were trained on.

    Raises:
        StageError: VerificationFailed, UnsupportedModel, and what the model's source raises.
    """
    use_all_cpus()
    snapshot, spec = ctx.snapshot, ctx.snapshot.spec
    ctx.reporter.report(activity="Downloading")
    expected = [SourceFile(path=f.path, size=f.size, sha256=f.sha256) for f in trained.base_files]
    base_files = fetch_base(ctx, prepared.model_commit, expected, limit_seconds=None)
    rows = fetch_held_out(ctx, workspace, prepared)

    ctx.reporter.report(activity="Merging")
    quantization = chosen(snapshot, prepared).plan.method.quantization
    checkpoint = Checkpoint(base_files.folder)
    empty = empty_model(base_files.folder, torch.bfloat16, spec.model.trust_remote_code)
    stored = StoredWeights(empty, checkpoint.tensors)
    round_trip = None
    if quantization is not None and spec.output.merged.base is MergedBase.QUANTIZED:
        records = [with_stored_name(record, stored.alone) for record in trained.quantized_modules]
        round_trip = RoundTrip(quantization, records, getattr(torch, trained.base_dtype))
    base = BaseWeights(checkpoint, round_trip, stored.conv1d)
    weights = trained.weights
    if weights is None:
        adapter = read_adapter(adapter_folder)
        must_train(adapter, prepared.trained_tokens)
        adapter = with_shared_head(in_files(adapter, stored), stored.head)
    else:
        config = json.loads((base_files.folder / "config.json").read_text())
        tied = is_tied(checkpoint.tensors, config)
        adapter = read_weights(adapter_folder, weights, checkpoint.tensors, tied)
    vocabulary = prepared.trained_tokens.resized_to if prepared.trained_tokens is not None else None
    dtype: torch.dtype = getattr(torch, spec.output.merged.dtype.value)
    folder = ctx.work_dir / (MERGED_DIR if weights is None else MODEL_DIR)
    total = sum(t.elements for t in checkpoint.tensors.values()) * dtype.itemsize
    merge(base, adapter, dtype, folder, ctx.reporter.transfer("merge", total))
    names = [f.path for f in base_files.files]
    write_companions(base_files.folder, names, adapter_folder, dtype, folder, vocabulary)

    ctx.reporter.report(activity="Verifying")
    check_written(base, adapter, folder)
    tokenizer = AutoTokenizer.from_pretrained(
        folder, trust_remote_code=spec.model.trust_remote_code, local_files_only=True
    )
    check = merge_check(
        base, adapter, folder, base_files.folder, rows, pad_token_id(tokenizer), trained,
        same_base=quantization is None or round_trip is not None, trust_remote_code=spec.model.trust_remote_code,
    )  # fmt: skip
    warnings = lost_in_rounding(check, trained.metrics, spec.output.merged.dtype.value, weights is None)
    return MergedModel(folder, check, quantization_warnings(round_trip) + warnings)


def with_stored_name(record: QuantizedModule, tensors: Mapping[str, str]) -> QuantizedModule:
    """A record of training's by the name that the base's files have.

    Args:
        tensors: of the parameters that stand there as they are, by the model's names for them.

    Raises:
        KeyError: a quantized weight that is none of them.
    """
    return record.model_copy(update={"name": module_of(tensors[f"{record.name}.weight"])})


def quantization_warnings(round_trip: RoundTrip | None) -> list[str]:
    """What a reader of the manifest should know about the quantized weights."""
    if round_trip is None or not round_trip.inexact:
        return []
    return [
        f"{len(round_trip.inexact)} of {len(round_trip.modules)} weights quantize on this CPU to values that differ in "
        f"rounding from those of training (such as {min(round_trip.inexact)})."
    ]


def fetch_held_out(ctx: StageContext, workspace: S3Store, prepared: PrepareResult) -> Rows:
    """The held-out rows, checked against the prepare stage's record."""
    path = ctx.work_dir / PREPARED_HELD_OUT
    try:
        found = wait_until_available(ctx, lambda: workspace.download_file(PREPARED_HELD_OUT, path))
    except NotFound as error:
        raise StageError(Reason.VERIFICATION_FAILED, f"{workspace.uri(PREPARED_HELD_OUT)} has disappeared.") from error
    must_equal(found, next(f for f in prepared.files if f.path == PREPARED_HELD_OUT), workspace.uri(PREPARED_HELD_OUT))
    return read_rows(path)


def upload_merged(ctx: StageContext, folder: Path, output: S3Store) -> list[FileRecord]:
    """Replace what an earlier execution may have left below ``merged/`` (or ``model/``). That is cleared once: what this one has sent stays."""
    ctx.reporter.report(activity="Uploading")
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    wait_until_available(ctx, lambda: output.clear(folder.name))
    return wait_until_available(
        ctx, lambda: output.upload_dir(folder, folder.name, ctx.reporter.transfer("upload", total))
    )
