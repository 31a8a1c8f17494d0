"""The model card: what a person needs who finds the adapter without having seen the job."""

from __future__ import annotations

from pathlib import Path

from finetune_api.results import DataSummary, MergeCheck, PrepareResult, Scores, TrainResult, chosen
from finetune_api.snapshot import ResolvedLora, Snapshot
from finetune_api.spec import LoraBias
from finetune_api.uris import HubLocation, parse_uri
from finetune_trainer.markdown import render
from finetune_trainer.private import without_credentials
from finetune_trainer.publish.facts import cost_facts, data_facts, method_facts
from finetune_trainer.publish.scores import score_rows
from finetune_trainer.publish.tasks import task_rows
from finetune_trainer.s3 import S3Store
from finetune_trainer.vllm import max_lora_rank

TEMPLATE = Path(__file__).with_name("card.md.j2")


def model_card(
    snapshot: Snapshot,
    prepared: PrepareResult,
    trained: TrainResult,
    scores: Scores,
    output: S3Store,
    merge_check: MergeCheck | None,
    warnings: list[str],
    *,
    merged: bool,
) -> str:
    """README.md of ``adapter/``, or of ``merged/`` or ``model/``."""
    snapshot = chosen(snapshot, prepared)
    method = snapshot.plan.method
    location = parse_uri(snapshot.spec.model.uri)
    return render(
        TEMPLATE,
        base_uri=snapshot.spec.model.uri,
        base_id=location.repo_id if isinstance(location, HubLocation) else None,
        commit=prepared.model_commit,
        job=snapshot.job,
        method=method,
        method_facts=method_facts(snapshot, method, prepared.plan, trained),
        data_facts=data_facts(snapshot, prepared.data),
        cost_facts=cost_facts(prepared.plan, trained),
        initial_adapter=prepared.initial_adapter,
        tokens=prepared.trained_tokens,
        output=snapshot.spec.output,
        sources=[without_credentials(s.uri) for s in snapshot.spec.data.train],
        data=prepared.data,
        held_out_overlap=held_out_overlap(prepared.data),
        data_hash=prepared.data_hash,
        metrics=trained.metrics,
        text=scores.text,
        judge=scores.judge,
        task_rows=task_rows(scores.tasks),
        score_rows=score_rows(scores.text) if scores.text is not None else [],
        verification=trained.verification,
        trained=trained,
        merge_check=merge_check,
        warnings=warnings,
        vllm_rank=vllm_rank(method.lora) if prepared.trained_tokens is None else None,
        merged=merged,
        adapter_uri=output.uri("adapter"),
        merged_uri=output.uri("merged" if trained.weights is None else "model"),
    )


def vllm_rank(lora: ResolvedLora) -> int | None:
    """What vLLM takes as ``--max-lora-rank`` for an adapter; None for one that vLLM does not serve. It drops peft's updates of fused experts, or reads
    them the other way round (vllm-project/vllm, pull requests 41384 and 52198)."""
    if lora.use_dora or lora.modules_to_save or lora.target_parameters or lora.bias is not LoraBias.NONE:
        return None
    return max_lora_rank(lora.highest_rank)


def held_out_overlap(data: DataSummary) -> str:
    """How far the held-out numbers can be trusted."""
    count, near = data.held_out_overlap_rows, data.held_out_near_rows
    if not count and not near:
        return "none of their prompts is trained on"
    found = [f"{count} of them ask a prompt that is trained on"] if count else []
    found += [f"{near} of them are nearly the same as a row that is trained on"] if near else []
    return f"**{', '.join(found)}, so these losses are too good**"
