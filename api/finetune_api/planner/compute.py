"""Floating-point operations, and how long a GPU takes for them."""

from __future__ import annotations

import math

from finetune_api.base import ApiModel
from finetune_api.planner.architecture import Architecture
from finetune_api.planner.linears import Linear, matrix_parameters
from finetune_api.planner.tensors import EMBEDDING, Shapes
from finetune_api.planner.workload import Batch, Tuning

DEFAULT_UTILIZATION = 0.35
"""Share of a GPU's dense peak that a run sustains. fsdp_qlora's published times (2024) come to 0.33 (70B on 4 × H100) to 0.58
(7B on 2 × RTX 4090) by the formula below; the lower end is taken."""


HOST_LINK_BYTES_PER_SECOND = 12e9
"""What pinned host memory sends to a GPU: PCIe 3.0 ×16 (15.8 GB/s by its standard, less its protocol); 4.0 does twice that."""


class Work(ApiModel):
    """Operations of training, in FLOP (a multiplication and an addition are two)."""

    flop_per_token: float
    flop_total: float
    seconds: float | None = None
    """On all GPUs together, where the GPU's speed is known."""
    gpu_hours: float | None = None


def training_flop_per_token(
    arch: Architecture, shapes: Shapes, targets: list[Linear], tuning: Tuning, batch: Batch
) -> float:
    """Forward 2 per weight, gradients of the inputs another 2 (Kaplan et al. 2020, section 2.1), and with checkpointing the
    forward pass again. Frozen weights have no gradient of their own; the adapter's have, and trained weights, so they count 2 once more.

    Attention: 4 × query size × tokens looked at, on average half the row (causal), for the forward pass, twice that for the
    backward pass. Of a mixture of experts, the experts that a token visits.
    """
    passes = 3 if batch.gradient_checkpointing else 2
    weights = sum(_used(name, shape, arch) for name, shape in shapes.items() if not EMBEDDING.search(name))
    if arch.tied_embeddings:
        weights += arch.vocabulary_size * arch.hidden_size
    attention = arch.layers * 4 * arch.query_size * batch.sequence_tokens / 2
    if tuning.full:
        head = arch.vocabulary_size * arch.hidden_size if tuning.trains_embeddings else 0
        own = sum(t.inputs * t.outputs for t in targets) + head
        return 2 * (weights * passes + own) + attention * (passes + 1)
    adapter = (2 if tuning.offset else 1) * matrix_parameters(targets, tuning)
    # The head has a gradient of its own where some of its rows are trained: it is made for all of them.
    of_head = 2 * arch.vocabulary_size * arch.hidden_size if tuning.token_rows else 0
    return 2 * weights * passes + 2 * adapter * (passes + 1) + attention * (passes + 1) + of_head


def work(
    flop_per_token: float,
    tokens: int,
    gpus: int,
    peak_tflops: float | None,
    sustained_tflops: float | None,
    offloaded_bytes: float = 0,
) -> Work:
    """A run's operations, and its time on ``gpus`` GPUs of ``peak_tflops`` (bf16, dense), or of the ``sustained_tflops``
    measured. Loading, evaluation and saving come on top.

    Args:
        offloaded_bytes: what each GPU copies from host memory in the whole run, which it waits for.
    """
    total = flop_per_token * tokens
    speed = sustained_tflops or (peak_tflops * DEFAULT_UTILIZATION if peak_tflops else None)
    seconds = total / (speed * 1e12 * gpus) + offloaded_bytes / HOST_LINK_BYTES_PER_SECOND if speed else None
    return Work(
        flop_per_token=flop_per_token,
        flop_total=total,
        seconds=seconds,
        gpu_hours=seconds * gpus / 3600 if seconds is not None else None,
    )


def _used(name: str, shape: tuple[int, ...], arch: Architecture) -> float:
    if len(shape) < 2:
        return 0
    share = arch.experts_per_token / arch.experts if ".experts." in name and arch.experts else 1.0
    return math.prod(shape) * share
