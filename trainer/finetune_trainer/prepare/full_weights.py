"""What ``method.type: Full`` trains: settled before a GPU is asked for, once for all executions."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune_api.failures import Reason
from finetune_api.full_weights import UnknownModule, most_signal, named_tensors, ranked_matrices, trained_count
from finetune_api.planner import UnknownArchitecture, describe, parse_config
from finetune_api.planner.tensors import BUFFER
from finetune_api.results import TrainedWeights
from finetune_api.spec import Full
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.shapes import HEAD, Parameters, why_not_writable
from finetune_trainer.prepare.singular import ratios
from finetune_trainer.sources.cache import cache_of
from finetune_trainer.sources.model import TensorHeaders, resolve_model
from finetune_trainer.waiting import wait_until_available

log = logging.getLogger(__name__)
Shapes = Mapping[str, tuple[int, ...]]


def count_full(headers: TensorHeaders, full: Full, tied: bool, uri: str) -> Parameters:
    """How many weights will be trained, of how many.

    Raises:
        StageError: UnknownTargetModule, UnsupportedModel; InvalidConfig for a head that is the embedding.
    """
    if found := why_not_writable(headers):
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"method.type: Full: expected a dense decoder with tensors named model.layers.…, {uri} has {found}. Use type: LoRA or QLoRA.",
        )
    if tied and full.modules and any(HEAD.search(module) for module in full.modules):
        raise StageError(
            Reason.INVALID_CONFIG,
            "method.full.modules names the output head, which this model shares with its input embeddings (tie_word_embeddings): name "
            "embed_tokens, and both are trained as one.",
        )
    shapes = {name: shape for name, (_, shape) in headers.items()}
    try:
        trainable = trained_count(trainable_shapes(shapes, tied), full)
    except UnknownModule as error:
        raise StageError(Reason.UNKNOWN_TARGET_MODULE, str(error)) from error
    total = sum(math.prod(shape) for name, shape in shapes.items() if not BUFFER.search(name))
    return Parameters(trainable, total, [])


def refuse_others(headers: TensorHeaders, full: Full, config: Mapping[str, Any], uri: str) -> None:
    """Tensors that are no parameters of the model, such as those of layers for multi-token prediction, cannot be trained. For an architecture
    that is not known the training pod finds them, before it computes anything.

    Raises:
        StageError: UnsupportedModel.
    """
    try:
        arch = parse_config(config)
    except UnknownArchitecture:
        return
    shapes = trainable_shapes({name: shape for name, (_, shape) in headers.items()}, arch.tied_embeddings)
    ranked = [name for names in ranked_matrices(shapes).values() for name in names]
    chosen = named_tensors(shapes, full) if full.spectrum is None else ranked
    parameters = describe(arch) if arch.known else shapes
    if others := [name for name in chosen if name not in parameters]:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"method.type: Full would train {len(others)} tensors of {uri} that are no parameters of a {config.get('model_type')} model, such "
            f"as {others[0]}: name others in method.full.modules, or use type: LoRA.",
        )


def trainable_shapes(shapes: Shapes, tied: bool) -> dict[str, tuple[int, ...]]:
    """Every tensor that may be trained: no buffers, and no copy of an embedding that is the head, too."""
    return {
        name: shape
        for name, shape in shapes.items()
        if not BUFFER.search(name) and not (tied and HEAD.search(name.removesuffix(".weight")))
    }


def choose_weights(ctx: StageContext, shapes: Shapes, full: Full, commit: str | None) -> TrainedWeights:
    """The tensors that training will change. For Spectrum the weights are fetched, into the cache if there is one.

    Args:
        shapes: of all tensors that may be trained.

    Raises:
        StageError: what the model's source raises.
    """
    if full.spectrum is None:
        return TrainedWeights(tensors=named_tensors(shapes, full))
    folder = wait_until_available(ctx, lambda: fetch_weights(ctx, commit))
    ctx.reporter.report(activity="Ranking")
    ranked = [name for names in ranked_matrices(shapes).values() for name in names]
    log.info("Spectrum: signal-to-noise ratios of %d matrices", len(ranked))
    found = ratios(folder, ranked)
    return TrainedWeights(tensors=most_signal(shapes, full.spectrum.fraction, found), signal_to_noise=found)


def fetch_weights(ctx: StageContext, commit: str | None) -> Path:
    """The model's folder: in the cache, or where that cannot hold it on this pod's disk."""
    source = resolve_model(ctx, commit)
    moved = ctx.reporter.transfer("download", sum(f.size for f in source.list_files()))
    cache = cache_of(ctx)
    cached = cache.fetch(source, moved) if cache is not None else None
    return cached or source.fetch(ctx.work_dir / "base", weights=True, on_bytes=moved)
