"""Whether merged model, base + adapter, and what training measured agree."""

from __future__ import annotations

from pathlib import Path

import torch

from finetune_api.failures import Reason
from finetune_api.results import MergeCheck, TrainMetrics, TrainResult
from finetune_trainer.errors import StageError
from finetune_trainer.publish.adapter import Adapter
from finetune_trainer.publish.merge import BaseWeights
from finetune_trainer.publish.safetensors_stream import Checkpoint
from finetune_trainer.publish.streamed import StreamedModel
from finetune_trainer.publish.tokens import with_rows
from finetune_trainer.train.device import cpu_dtype
from finetune_trainer.train.rows import Rows

TRAINED_TOLERANCE = 5e-3
"""Base + adapter here against training's own measurement: other kernels, the same numbers. Measured at 135M on a CPU: 5e-5 after
28 steps, 3e-4 after 4."""
TRAINED_ABSOLUTE = 2e-3
"""Added to it, in nats a token. What GPU and CPU do differently does not shrink with the loss: the last hidden state, rounded to
bfloat16 (2⁻⁹ of its size), moves logits of a size of ten by about 0.02 each, without direction; over the some hundred tokens
of a check about 1e-3 is left. At a loss of 0.05 the relative tolerance would allow 2.5e-4."""
MERGED_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 5e-3}
"""Merged against base + adapter. What is below half a step of its weight's type is rounded away. Measured at 135M in bfloat16:
1.0e-2 after 28 steps (3 % of what was learned), 7e-3 after 4, 3.5e-2 after 2 steps in the middle of a steep warm-up."""
MOST_ROUNDED_AWAY = 0.1
"""Share of the loss that a 16-bit merge may add to that, as far as so much was learned at all: updates of a short training are less than half
a step of many weights. A warning tells of it (``lost_in_rounding``). That each tensor is what it should be is proven elsewhere."""
LOST_SHARE = 0.1
"""Share of what was learned that may be lost in rounding before the manifest carries a warning."""


def merge_check(
    base: BaseWeights, adapter: Adapter, merged: Path, base_folder: Path, rows: Rows, pad_id: int, trained: TrainResult, *,
    same_base: bool, trust_remote_code: bool,
) -> MergeCheck:  # fmt: skip
    """Held-out loss three ways on the rows that the train stage measured last.

    Merged against base + adapter shows that what was written (see :mod:`finetune_trainer.publish.written`) loads as a model; base + adapter against the train stage's own number shows
    that base and adapter are what was trained.

    Args:
        same_base: whether ``base`` is what training saw (not so when QLoRA merges into the original weights).

    Raises:
        StageError: VerificationFailed.
    """
    indices = list(range(trained.check_rows))

    def unmerged(name: str) -> torch.Tensor:
        if name in adapter.tokens:
            parts = with_rows(base.rows(name), adapter.tokens[name], adapter.token_rows(name))
            return torch.cat([rows.to(compute) for _, rows in parts])
        return adapter.replacement(name) if name in adapter.replaced else base.read(name)

    checkpoint = Checkpoint(merged)
    dtype = widest_dtype(checkpoint)
    # bfloat16, as in training, unless that would round the merged weights once more, or take too long on this CPU.
    compute = cpu_dtype() if dtype is torch.bfloat16 else torch.float32
    tolerance = MERGED_TOLERANCE.get(dtype, min(MERGED_TOLERANCE.values()))
    with_adapter = StreamedModel(
        base_folder,
        set(base.checkpoint.tensors),
        unmerged,
        compute,
        adapter=adapter,
        trust_remote_code=trust_remote_code,
    ).loss(rows, indices, pad_id)
    measured = trained.check_loss if same_base else None
    if measured is not None:
        must_agree(
            "training measured",
            measured,
            with_adapter,
            TRAINED_TOLERANCE,
            len(indices),
            TRAINED_ABSOLUTE,
            adapter.words,
        )
    in_one = StreamedModel(
        merged, set(checkpoint.tensors), checkpoint.read, compute, trust_remote_code=trust_remote_code
    ).loss(rows, indices, pad_id)
    rounded = may_be_rounded_away(trained.metrics, with_adapter) if dtype is not torch.float32 else 0.0
    must_agree("the merged model has", in_one, with_adapter, tolerance, len(indices), rounded, adapter.words)
    return MergeCheck(
        held_out_loss_adapter=with_adapter,
        held_out_loss_merged=in_one,
        held_out_loss_trained=measured,
        relative_difference=relative(in_one, with_adapter),
        tolerance=tolerance,
        rows=len(indices),
    )


def may_be_rounded_away(metrics: TrainMetrics, loss: float) -> float:
    """What rounding may take from the merged weights, in nats a token: at most what was learned."""
    return max(0.0, min(metrics.held_out_loss_base - metrics.held_out_loss, MOST_ROUNDED_AWAY * loss))


def must_agree(
    what: str, found: float, expected: float, tolerance: float, rows: int, absolute: float = 0.0,
    whole: str = "base + adapter",
) -> None:  # fmt: skip
    """Raises VerificationFailed beyond ``tolerance`` (relative) + ``absolute``, and for NaN."""
    allowed = tolerance * abs(expected) + absolute
    if not abs(found - expected) <= allowed:
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"on {rows} held-out rows, {whole} have loss {expected:.4f} and {what} {found:.4f} "
            f"(difference {abs(found - expected):.2g}, allowed {allowed:.2g}).",
        )


def lost_in_rounding(check: MergeCheck, metrics: TrainMetrics, dtype: str, has_adapter: bool = True) -> list[str]:
    """A warning if the merged type swallows much of what was learned."""
    learned = metrics.held_out_loss_base - metrics.held_out_loss
    lost = check.held_out_loss_merged - check.held_out_loss_adapter
    if learned <= 0 or lost <= LOST_SHARE * learned:
        return []
    return [
        f"rounding the merged weights to {dtype} loses {100 * lost / learned:.0f} % of what was learned (held-out loss "
        f"{check.held_out_loss_merged:.4f}, {'with the adapter' if has_adapter else 'as trained'} {check.held_out_loss_adapter:.4f}): "
        f"use {'the adapter, or ' if has_adapter else ''}output.merged.dtype: float32."
    ]


def widest_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The type of the widest weights."""
    return max(
        (t.dtype for t in checkpoint.tensors.values() if t.dtype is not None),
        key=lambda d: d.itemsize,
        default=torch.float32,
    )


def relative(found: float, expected: float) -> float:
    """|found − expected| / |expected|."""
    return abs(found - expected) / max(abs(expected), 1e-9)
