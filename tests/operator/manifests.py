"""Fluent builders of FineTuneJobs, and the reports that stages leave."""

from __future__ import annotations

import json
from typing import Any, Self

from finetune_api.combination import CombineReport
from finetune_api.names import Stage
from finetune_api.progress import Split, StageReport
from finetune_api.results import (
    CleanupReport,
    DataSummary,
    FetchReport,
    LengthPercentiles,
    PrepareReport,
    PublishReport,
    RunPlan,
    TrainMetrics,
    TrainReport,
    Verification,
)
from finetune_api.spec import MethodType

Raw = dict[str, Any]
DELETE: Raw = {"output": {"uri": "s3://results/here", "deletionPolicy": "Delete"}}
"""Fields of the spec of a job whose stored output is deleted with it."""


class FineTuneJobBuilder:
    """``finetunejob("a").suspended().deadline(5).build()``."""

    def __init__(self, name: str, namespace: str = "default") -> None:
        self.raw: Raw = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {
                "model": {"uri": "s3://models/smol"},
                "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
                "output": {"uri": "s3://results/here"},
            },
        }

    def set(self, **fields: object) -> Self:
        """Set top-level spec fields."""
        self.raw["spec"].update(fields)
        return self

    def suspended(self) -> Self:
        """spec.suspend."""
        return self.set(suspend=True)

    def deadline(self, seconds: int) -> Self:
        """spec.activeDeadlineSeconds."""
        return self.set(activeDeadlineSeconds=seconds)

    def pending_timeout(self, seconds: int) -> Self:
        """spec.pendingTimeoutSeconds."""
        return self.set(pendingTimeoutSeconds=seconds)

    def ttl(self, seconds: int) -> Self:
        """spec.ttlSecondsAfterFinished."""
        return self.set(ttlSecondsAfterFinished=seconds)

    def max_failures(self, count: int) -> Self:
        """spec.recovery.maxFailures."""
        return self.set(recovery={"maxFailures": count})

    def build(self) -> Raw:
        """The manifest."""
        return self.raw


def finetunejob(name: str, namespace: str = "default") -> FineTuneJobBuilder:
    """The smallest FineTuneJob."""
    return FineTuneJobBuilder(name, namespace)


def combination(name: str, **fields: object) -> Raw:
    """The smallest AdapterCombination, and what is set besides."""
    return {
        "apiVersion": "finetune.dev/v1alpha1",
        "kind": "AdapterCombination",
        "metadata": {"name": name},
        "spec": {
            "adapters": [{"uri": "s3://adapters/tone"}, {"uri": "s3://adapters/facts", "weight": 0.5}],
            "output": {"uri": "s3://results/here"},
            **fields,
        },
    }


COMBINED = CombineReport(
    base_model="org/smol",
    rank=12,
    modules=14,
    relative_error=2e-8,
    exact=True,
    adapter_bytes=4096,
    adapter_sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
)

METRICS = TrainMetrics(
    held_out_loss_base=1.402,
    held_out_loss=0.861,
    perplexity_base=4.06,
    perplexity=2.37,
    final_train_loss=0.874,
    steps=640,
    epochs=3.0,
    tokens=1_000_000,
    tokens_per_second=1051.5,
    train_seconds=951.0,
)
VERIFICATION = Verification(
    held_out_loss_trained=0.861, held_out_loss_reloaded=0.861, relative_difference=0.0, tolerance=1e-3
)


def prepare_report(trained: bool = False) -> PrepareReport:
    """What prepare found."""
    data = DataSummary(
        rows=5120,
        train_rows=4608,
        held_out_rows=512,
        bad_rows=0,
        truncated_rows=3,
        dropped_rows=0,
        duplicate_rows=12,
        formats={"Messages": 5120},
        train_tokens=1_000_000,
        train_target_tokens=400_000,
        held_out_tokens=100_000,
        held_out_target_tokens=40_000,
        tokens=LengthPercentiles(p50=200, p95=611, p99=1500, max=2500),
    )
    return PrepareReport(
        data=data,
        data_hash="a" * 64,
        model_commit=None,
        trainable_parameters=41_943_040,
        total_parameters=8_030_261_248,
        total_steps=640,
        trained=trained,
    )


def planned_success(gpus_per_node: int, avoid: list[str] | None = None) -> StageReport:
    """A good end of prepare with a plan for so many GPUs that are none of ``avoid``."""
    split = Split(
        micro_batch_sequences=4, gradient_accumulation_steps=4, gradient_checkpointing=True, max_sequence_tokens=2048
    )
    plan = RunPlan(
        method=MethodType.LORA,
        split=split,
        gpus_per_node=gpus_per_node,
        needed_bytes=1,
        peak_allocated_bytes=1,
        verified=True,
        summary="so",
        unsuitable_gpu_products=avoid,
    )
    report = prepare_report().model_copy(update={"plan": plan})
    return success(Stage.PREPARE).model_copy(update={"result": report.to_json_dict()})


def train_report() -> TrainReport:
    """What train measured."""
    return TrainReport(metrics=METRICS, verification=VERIFICATION, adapter_bytes=168_000_000, device="cpu")


def publish_report() -> PublishReport:
    """What publish checked."""
    return PublishReport(metrics=METRICS, verification=VERIFICATION, adapter_bytes=168_000_000, files=9)


def success(stage: Stage, trained: bool = False) -> StageReport:
    """A stage's good end."""
    result = {
        Stage.PREPARE: prepare_report(trained),
        Stage.TRAIN: train_report(),
        Stage.PUBLISH: publish_report(),
        Stage.FETCH: FetchReport(cached=True),
        Stage.CLEANUP: CleanupReport(objects=9),
        Stage.COMBINE: COMBINED,
    }[stage]
    return StageReport(stage=stage, succeeded=True, reason="Succeeded", message="done", result=result.to_json_dict())


def failure(stage: Stage, reason: str, message: str) -> StageReport:
    """A stage's bad end."""
    return StageReport(stage=stage, succeeded=False, reason=reason, message=message)


def termination_message(report: StageReport) -> str:
    """As the entry point writes it."""
    return json.dumps(report.to_json_dict(), separators=(",", ":"))
