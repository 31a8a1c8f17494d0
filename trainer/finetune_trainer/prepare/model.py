"""What prepare needs to know of the base model: tokenizer, template, shapes. No weights are read."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.failures import Reason
from finetune_api.results import SourceFile, TrainedTokens
from finetune_api.spec import CpuOffload, MethodType, Parallelism
from finetune_trainer.context import StageContext
from finetune_trainer.cpus import memory_limit
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import ChatRenderer, chat_template, load_tokenizer, tried_renderer
from finetune_trainer.prepare.four_bit import left_in_16_bit
from finetune_trainer.prepare.full_weights import count_full, refuse_others
from finetune_trainer.prepare.initial_adapter import InitialAdapter, fetch_initial_adapter, must_fit
from finetune_trainer.prepare.room import disk_warnings, merge_warnings
from finetune_trainer.prepare.shapes import (
    Parameters,
    check_config,
    check_mergeable,
    count_parameters,
    is_mixture_of_experts,
    refuse_mamba_projections,
    refuse_other_experts,
    refuse_unsaveable,
)
from finetune_trainer.prepare.tokenizer_files import tokenizer_hash
from finetune_trainer.prepare.trained_tokens import grown, is_tied, resized_config, trained_rows, trained_tokens
from finetune_trainer.s3_transfer import CHUNK_BYTES
from finetune_trainer.sources.model import ModelSource, TensorHeaders, resolve_model
from finetune_trainer.waiting import wait_until_available


@dataclass(frozen=True)
class BaseModel:
    """The base model as far as prepare knows it."""

    uri: str
    commit: str | None
    files: list[SourceFile]
    tokenizer: Any
    tokenizer_hash: str
    renderer: ChatRenderer | None
    vocabulary: int
    """Rows of the embedding: token ids must be below it."""
    parameters: Parameters
    config: dict[str, Any]
    """config.json; with new tokens, of the resized model."""
    shapes: dict[str, tuple[int, ...]]
    """Of every tensor in the weights' files; with new tokens, of the resized embeddings."""
    warnings: list[str]
    adapter: InitialAdapter | None = None
    """What training goes on from."""
    folder: Path = Path()
    """Where configuration and tokenizer lie."""
    tokens: TrainedTokens | None = None
    """Those whose rows of the embeddings are trained."""


def inspect_model(ctx: StageContext) -> BaseModel:
    """Fetch configuration and tokenizer, and the shapes out of the weights' headers.

    Raises:
        StageError: whatever makes the model unusable, and for good; what may be mended is waited for.
    """
    spec = ctx.snapshot.spec.model
    ctx.reporter.report(activity="Downloading")
    moved = ctx.reporter.transfer("download")

    def fetch() -> tuple[ModelSource, Path, TensorHeaders]:
        model = resolve_model(ctx)
        folder = model.fetch(ctx.work_dir / "model-config", weights=False, on_bytes=moved)
        return model, folder, model.safetensors_headers()

    model, folder, headers = wait_until_available(ctx, fetch)
    config = check_config(folder, spec.uri)
    if ctx.snapshot.spec.output.merged.enabled:
        check_mergeable(headers, config.get("model_type"), spec.uri)
    tokenizer = load_tokenizer(folder, spec.trust_remote_code)
    tokens = trained_tokens(tokenizer, ctx.snapshot.spec, headers)
    if tokens is not None and tokens.resized_to is not None:
        headers, config = grown(headers, tokens.resized_to), resized_config(config, tokens.resized_to)
    own = ctx.snapshot.spec.data.chat_template
    template = own or chat_template(tokenizer)
    renderer = tried_renderer(tokenizer, template, given=own is not None) if template else None
    records = _source_files(model, folder)
    warnings = disk_warnings(ctx.snapshot.spec, sum(record.size for record in records))
    positions = config.get("max_position_embeddings")
    limit = ctx.snapshot.spec.training.max_sequence_tokens
    if isinstance(positions, int) and limit > positions:
        warnings.append(
            f"training.maxSequenceTokens {limit:,} is beyond the {positions:,} positions the model was trained for"
        )
    adapter = fetch_initial_adapter(ctx, headers)
    snapshot = ctx.snapshot if adapter is None else ctx.snapshot.with_lora(adapter.record.lora)
    method, tied = snapshot.plan.method, is_tied(headers, config)
    lora = method.lora
    training = snapshot.spec.training
    shards = training.parallelism is Parallelism.FSDP or training.cpu_offload is not CpuOffload.NEVER
    if adapter is not None and lora.use_dora and shards:
        raise StageError(
            Reason.INVALID_CONFIG,
            "model.initialAdapter is trained with DoRA, which needs the whole base model on each GPU: leave training.parallelism: FSDP and "
            "cpuOffload out",
        )
    if method.full is not None:
        parameters = count_full(headers, method.full, tied, spec.uri)
        refuse_others(headers, method.full, config, spec.uri)
    else:
        refuse_other_experts(lora, config.get("model_type"), spec.uri)
        refuse_unsaveable(headers, lora, tied, method.type is not MethodType.LORA)
        parameters = count_parameters(headers, lora, trained_rows(headers, config, tokens))
        refuse_mamba_projections(config.get("model_type"), parameters)
        if is_mixture_of_experts(headers):
            warnings.append(of_experts(parameters))
    shapes = {name: shape for name, (_, shape) in headers.items()}
    warnings += merge_warnings(snapshot.spec, shapes, memory_limit())
    if much := left_in_16_bit(method.type, config, shapes, spec.uri):
        warnings.append(much)
    if adapter is not None:
        must_fit(adapter, snapshot.spec, shapes, parameters)
    return BaseModel(
        uri=spec.uri,
        commit=model.commit,
        files=records,
        tokenizer=tokenizer,
        tokenizer_hash=tokenizer_hash({f.path: f.sha256 for f in records if f.sha256}, template, spec.new_tokens or ()),
        renderer=renderer,
        vocabulary=_vocabulary(config, headers, spec.uri),
        parameters=parameters,
        config=config,
        shapes=shapes,
        adapter=adapter,
        warnings=warnings,
        folder=folder,
        tokens=tokens,
    )


def of_experts(parameters: Parameters) -> str:
    """What of a mixture of experts is adapted, and what is not."""
    kinds = sorted({name.rpartition(".")[2] for name in parameters.targets})
    if parameters.experts:
        fused = sorted({name.rpartition(".")[2] for name in parameters.experts})
        return (
            f"mixture of experts: the adapter is on {', '.join(kinds)} and, for each expert, on {', '.join(fused)}; shared experts and routers stay as "
            "they are"
        )
    return f"mixture of experts: the adapter is on {', '.join(kinds)}; all experts (shared ones, too) and their routers stay as they are"


def _vocabulary(config: dict[str, Any], headers: TensorHeaders, uri: str) -> int:
    for name, (_, shape) in headers.items():
        if (
            name.endswith(("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"))
            and len(shape) == 2
        ):
            return int(shape[0])
    if isinstance(config.get("vocab_size"), int):
        return int(config["vocab_size"])
    raise StageError(
        Reason.UNSUPPORTED_MODEL, f"{uri}: neither config.json nor the weights tell the size of the vocabulary"
    )


def _source_files(model: ModelSource, folder: Path) -> list[SourceFile]:
    """Every file: hashed where it was fetched, otherwise with what the source tells of it."""
    weights = set(model.weight_files())
    records = []
    for file in model.list_files():
        read = file.path not in weights
        records.append(
            SourceFile(
                path=file.path,
                size=file.size,
                sha256=_sha256(folder / file.path) if read else file.sha256,
                version=None if read else model.version(file.path),
            )
        )
    return records


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
