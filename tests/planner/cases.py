"""Simulated cases in the planner's words."""

from __future__ import annotations

import functools
from typing import Any

from finetune_api.planner import Architecture, Attention, Batch, Request, Shapes, Tuning, describe, parse_config
from finetune_api.spec import QuantizationType
from tests.planner.simulator.golden import read_config
from tests.planner.simulator.step import Case


@functools.cache
def model(name: str) -> tuple[Architecture, Shapes]:
    """Architecture and shapes of a committed config.json."""
    arch = parse_config(read_config(name))
    return arch, describe(arch)


def request_for(case: Case, config: dict[str, Any] | None = None) -> Request:
    """What the planner is asked for a simulated case.

    Args:
        config: another config.json than the model's.
    """
    arch, shapes = model(case.model)
    if config is not None:
        arch = parse_config(config)
        shapes = describe(arch)
    return Request(
        architecture=arch,
        shapes=shapes,
        tuning=Tuning(
            rank=case.rank,
            dropout=case.dropout,
            target_modules=list(case.target_modules),
            quantized=case.quantized,
            quantization=QuantizationType.INT8 if case.eight_bit else QuantizationType.NF4,
            double_quantization=case.double_quantization,
            offset=case.offset,
        ),
        batch=Batch(
            sequence_tokens=case.sequence_tokens,
            micro_batch_sequences=case.micro_batch_sequences,
            gradient_checkpointing=case.checkpointing,
            attention=Attention(case.attention),
        ),
    )
