"""Optimizers, by transformers' own names: those that the locked libraries bring along.

``galore_adamw`` is ours (finetune_trainer.train.galore). The others of ``transformers.training_args.OptimizerNames`` need packages that the trainer image has not (torchao, apollo,
 lomo, schedulefree, grokadamw, torch-optimi, torchdistx) or other hardware (XLA, NPU): such a name would fail only when
a GPU is held already. tests/api/test_optimizers.py holds this list to the libraries, on a CPU: bitsandbytes' optimizers
(0.50.2) run there, too.
"""

from __future__ import annotations

from enum import StrEnum


class OptimizerName(StrEnum):
    """``TrainingArguments.optim``."""

    ADAMW_TORCH = "adamw_torch"
    ADAMW_TORCH_FUSED = "adamw_torch_fused"
    ADAMW_8BIT = "adamw_8bit"
    ADAMW_BNB_8BIT = "adamw_bnb_8bit"
    PAGED_ADAMW_8BIT = "paged_adamw_8bit"
    PAGED_ADAMW_32BIT = "paged_adamw_32bit"
    ADAFACTOR = "adafactor"
    ADAGRAD = "adagrad"
    SGD = "sgd"
    RMSPROP = "rmsprop"
    RMSPROP_BNB = "rmsprop_bnb"
    RMSPROP_BNB_8BIT = "rmsprop_bnb_8bit"
    RMSPROP_BNB_32BIT = "rmsprop_bnb_32bit"
    LION_8BIT = "lion_8bit"
    LION_32BIT = "lion_32bit"
    PAGED_LION_8BIT = "paged_lion_8bit"
    PAGED_LION_32BIT = "paged_lion_32bit"
    ADEMAMIX = "ademamix"
    ADEMAMIX_8BIT = "ademamix_8bit"
    PAGED_ADEMAMIX_8BIT = "paged_ademamix_8bit"
    PAGED_ADEMAMIX_32BIT = "paged_ademamix_32bit"
    GALORE_ADAMW = "galore_adamw"


WITHOUT_BITSANDBYTES = frozenset(
    {
        OptimizerName.ADAMW_TORCH,
        OptimizerName.ADAMW_TORCH_FUSED,
        OptimizerName.ADAFACTOR,
        OptimizerName.ADAGRAD,
        OptimizerName.SGD,
        OptimizerName.RMSPROP,
        OptimizerName.GALORE_ADAMW,
    }
)
"""torch's, transformers' and our own; the others are bitsandbytes'."""
