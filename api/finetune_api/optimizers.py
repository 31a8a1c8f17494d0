"""Optimizers, by transformers' own names (``transformers.training_args.OptimizerNames`` of 5.23): all of them, and why some cannot run.

``galore_adamw`` is ours (finetune_trainer.train.galore). A name that cannot run would fail only when a GPU is held already.
tests/api/test_optimizers.py holds these lists to the libraries, on a CPU: bitsandbytes' optimizers (0.50.2) run there, too.
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
    SCHEDULE_FREE_ADAMW = "schedule_free_adamw"
    SCHEDULE_FREE_RADAM = "schedule_free_radam"
    SCHEDULE_FREE_SGD = "schedule_free_sgd"
    STABLE_ADAMW = "stable_adamw"
    LOMO = "lomo"
    ADALOMO = "adalomo"
    GALORE_ADAMW_LAYERWISE = "galore_adamw_layerwise"
    GALORE_ADAMW_8BIT_LAYERWISE = "galore_adamw_8bit_layerwise"
    GALORE_ADAFACTOR_LAYERWISE = "galore_adafactor_layerwise"
    APOLLO_ADAMW_LAYERWISE = "apollo_adamw_layerwise"
    GALORE_ADAMW_8BIT = "galore_adamw_8bit"
    GALORE_ADAFACTOR = "galore_adafactor"
    APOLLO_ADAMW = "apollo_adamw"
    GROKADAMW = "grokadamw"
    ADAMW_TORCH_4BIT = "adamw_torch_4bit"
    ADAMW_TORCH_8BIT = "adamw_torch_8bit"
    ADAMW_ANYPRECISION = "adamw_anyprecision"
    ADAMW_TORCH_XLA = "adamw_torch_xla"
    ADAMW_TORCH_NPU_FUSED = "adamw_torch_npu_fused"


_O = OptimizerName
REFUSED: tuple[tuple[tuple[OptimizerName, ...], str], ...] = (
    (
        (
            _O.LOMO,
            _O.ADALOMO,
            _O.GALORE_ADAMW_LAYERWISE,
            _O.GALORE_ADAMW_8BIT_LAYERWISE,
            _O.GALORE_ADAFACTOR_LAYERWISE,
            _O.APOLLO_ADAMW_LAYERWISE,
        ),
        "lomo, adalomo and the layerwise optimizers change the weights within the backward pass, so there are no gradients to accumulate, to "
        "clip, or to add up over GPUs: use adafactor, or galore_adamw with method.type: Full",
    ),
    (
        (_O.GALORE_ADAMW_8BIT, _O.GALORE_ADAFACTOR),
        "galore_adamw_8bit and galore_adafactor keep projections that a checkpoint cannot hold (galore-torch 1.0): use galore_adamw, whose "
        "projections are part of it",
    ),
    (
        (_O.APOLLO_ADAMW,),
        "apollo_adamw is licensed for non-commercial use only, and keeps projections that a checkpoint cannot hold (apollo-torch 1.0.3): "
        "use galore_adamw with method.type: Full, or adamw_8bit",
    ),
    (
        (_O.GROKADAMW,),
        "grokadamw keeps its state where a checkpoint cannot find it (grokadamw 0.1.2, of 2024, the last release): use stable_adamw or "
        "adamw_torch_fused",
    ),
    (
        (_O.ADAMW_TORCH_4BIT, _O.ADAMW_TORCH_8BIT),
        "adamw_torch_4bit and adamw_torch_8bit are compiled when they are first used (torchao), and the image has no compiler: use adamw_8bit "
        "or paged_adamw_8bit",
    ),
    (
        (_O.ADAMW_ANYPRECISION,),
        "adamw_anyprecision needs torchdistx, which is no longer developed, and is for weights in 16 bit; what is trained here is float32: "
        "use adamw_torch_fused",
    ),
    (
        (_O.ADAMW_TORCH_XLA, _O.ADAMW_TORCH_NPU_FUSED),
        "adamw_torch_xla and adamw_torch_npu_fused are for TPUs and Ascend NPUs: use adamw_torch_fused",
    ),
)
"""What cannot run here, with the reason and what to take instead, in the words of the refusal."""

RUNNING = tuple(name for name in OptimizerName if all(name not in names for names, _ in REFUSED))
"""What a job may ask for."""

SCHEDULE_FREE = frozenset({_O.SCHEDULE_FREE_ADAMW, _O.SCHEDULE_FREE_RADAM, _O.SCHEDULE_FREE_SGD})
"""Those that average weights in place of lowering the learning rate (Defazio et al., 2024): the averages are what was learned."""

WITHOUT_BITSANDBYTES = SCHEDULE_FREE | {
    _O.ADAMW_TORCH,
    _O.ADAMW_TORCH_FUSED,
    _O.ADAFACTOR,
    _O.ADAGRAD,
    _O.SGD,
    _O.RMSPROP,
    _O.GALORE_ADAMW,
    _O.STABLE_ADAMW,
}
"""torch's, transformers', schedulefree's, torch-optimi's and our own; the others that run are bitsandbytes'."""
