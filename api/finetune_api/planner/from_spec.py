"""A FineTuneJob's spec in the planner's words."""

from __future__ import annotations

from finetune_api.planner.architecture import Architecture
from finetune_api.planner.plan import Request
from finetune_api.planner.tensors import Shapes
from finetune_api.planner.workload import Attention, Batch, Tuning
from finetune_api.spec import FineTuneJobSpec


def request_of(
    spec: FineTuneJobSpec,
    arch: Architecture,
    shapes: Shapes,
    *,
    gpus: int = 1,
    attention: Attention = Attention.SDPA,
    run_tokens: int | None = None,
) -> Request:
    """What :func:`finetune_api.planner.choose` takes; it settles the method and the micro-batch.

    Args:
        run_tokens: tokens of the whole run, as prepare counts them; without it a run of so many steps is taken to be of the longest
            rows, and one of epochs has no time.
    """
    training, lora = spec.training, spec.method.lora
    if run_tokens is None and training.length.steps is not None:
        run_tokens = training.length.steps * training.global_batch_sequences * training.max_sequence_tokens
    return Request(
        architecture=arch,
        shapes=shapes,
        tuning=Tuning(
            rank=lora.rank,
            dropout=lora.dropout,
            bias=lora.bias,
            target_modules=list(lora.target_modules),
            double_quantization=spec.method.quantization.double_quantization,
        ),
        batch=Batch(
            sequence_tokens=training.max_sequence_tokens,
            gradient_checkpointing=training.gradient_checkpointing,
            attention=attention,
        ),
        optimizer=training.optimizer.name,
        gpus=gpus,
        generation_prompts=spec.evaluation.generation.prompts,
        generation_new_tokens=spec.evaluation.generation.max_new_tokens,
        run_tokens=run_tokens or 0,
    )
