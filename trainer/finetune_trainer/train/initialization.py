"""What an adapter's weights are before the first step, where they are not peft's own random ones."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from finetune_api.progress import Split
from finetune_api.snapshot import Snapshot
from finetune_api.spec import BEGIN_AT_WEIGHTS, LoraInitialization
from finetune_trainer import heartbeat
from finetune_trainer.train.device import Compute
from finetune_trainer.train.eva import eva
from finetune_trainer.train.model import take_up
from finetune_trainer.train.offset_lora import begin_at, lora_layers
from finetune_trainer.train.ranks import Ranks
from finetune_trainer.train.rows import Batch, Rows, collate
from finetune_trainer.train.schedule import Schedule
from finetune_trainer.train.sharded import Stored

log = logging.getLogger(__name__)

EVA_STEPS = 32
"""Steps of the schedule whose rows EVA may look at; it ends earlier where the directions no longer change."""
OVERSAMPLING, ITERATIONS = 8, 4
"""Of the randomized SVD (Halko et al., 2011): singular values beyond the rank, and power iterations."""


def initialize(
    model: PeftModel,
    snapshot: Snapshot,
    folder: Path,
    rows: Rows,
    schedule: Schedule,
    split: Split,
    pad_id: int,
    compute: Compute,
    ranks: Ranks,
) -> None:
    """Give a fresh adapter its first weights, on the first rank, and the same on the others.

    Args:
        folder: the base model's files.
    """
    kind = snapshot.plan.method.lora.initialization
    if kind not in (LoraInitialization.EVA, LoraInitialization.LOFTQ, *BEGIN_AT_WEIGHTS):
        return

    def made() -> dict[str, torch.Tensor]:
        if kind is LoraInitialization.EVA:
            size = max(1, split.micro_batch_sequences // split.evaluation_divisor)
            eva(model, list(batches(rows, schedule, size, pad_id)), compute)
        elif kind in BEGIN_AT_WEIGHTS:
            begin_at_weights(model, kind)
        else:
            with ExitStack() as opened:
                stored = Stored(folder, opened)
                own = f"{model.get_base_model().base_model_prefix}."
                loftq(model, lambda name: stored.read(name if name in stored else name.removeprefix(own)))
        return {n: t.detach().cpu() for n, t in get_peft_model_state_dict(model, save_embedding_layers=False).items()}

    take_up(model, ranks.share(made))


def batches(rows: Rows, schedule: Schedule, size: int, pad_id: int) -> Iterator[Batch]:
    """The first rows that training will see."""
    for step in range(min(EVA_STEPS, schedule.steps)):
        ids = schedule.step_rows(step)
        for start in range(0, len(ids), size):
            yield collate(rows, ids[start : start + size], pad_id)


def loftq(model: PeftModel, read: Callable[[str], torch.Tensor]) -> None:
    """B·A is what 4 bits leave of a weight, as far as the rank goes (Li et al., 2023): at the first step the model is nearer to the one in 16 bit.

    Not peft's, which asks for CUDA and does not divide by the scaling, so that the error is made good for twice at alpha = 2 × rank.

    Args:
        read: a weight as it is stored, by its name in the base's files.
    """
    from bitsandbytes.functional import dequantize_4bit  # only here: a base that is not quantized needs no bitsandbytes

    adapter = model.active_adapter
    for name, module in model.get_base_model().named_modules():
        state = getattr(getattr(module, "base_layer", None), "quant_state", None)
        if not isinstance(module, LoraLayer) or state is None:
            continue
        heartbeat.beat()
        packed = module.get_base_layer().weight.data
        held = dequantize_4bit(packed, state).float()
        stored = read(f"{name}.weight")
        if issubclass(module.get_base_layer().source_cls, Conv1D):
            stored = stored.T  # (inputs, outputs) in the files; transformers turns it before it is quantized
        left = stored.to(device=held.device, dtype=state.dtype).float() - held
        a, b = factors(left, module.r[adapter])
        module.lora_A[adapter].weight.data = a
        module.lora_B[adapter].weight.data = b / module.scaling[adapter]


def begin_at_weights(model: PeftModel, kind: LoraInitialization) -> None:
    """PiSSA (Meng et al., 2024): A0 and B0 are the weight's largest singular values and their vectors, shared out evenly and over the scaling.
    OLoRA (Büyükakyüz, 2024): R and Q of its QR decomposition, as in peft without regard to the scaling. Of a quantized weight, as training sees it."""
    adapter = model.active_adapter
    for module in lora_layers(model):
        heartbeat.beat()
        weight = dequantize_module_weight(module.get_base_layer()).data.float()
        weight = weight.T if module.fan_in_fan_out else weight
        rank = module.r[adapter]
        if kind is LoraInitialization.PISSA:
            root = math.sqrt(module.scaling[adapter])
            a, b = (part / root for part in factors(weight, rank))
        else:
            a, b = orthogonal_factors(weight, rank)
        begin_at(module, adapter, a, b)


def orthogonal_factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first rows of R (rank, inputs) and columns of Q (outputs, rank). Those of Q follow from as many columns of the matrix alone."""
    q = torch.linalg.qr(matrix[:, :rank]).Q
    return _padded(q.T @ matrix, q, rank)


def factors(matrix: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A (rank, inputs) and B (outputs, rank), float32, whose product is the nearest matrix of that rank to ``matrix`` (outputs, inputs)."""
    wanted = min(rank + OVERSAMPLING, *matrix.shape)
    left, values, right = torch.svd_lowrank(matrix, q=wanted, niter=ITERATIONS)
    root = values[:rank].sqrt()
    return _padded(root[:, None] * right[:, :rank].T, left[:, :rank] * root, rank)


def _padded(a: torch.Tensor, b: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """With zeros, where a small matrix has no such rank."""
    missing = rank - len(a)
    return pad(a, (0, 0, 0, missing)).contiguous(), pad(b, (0, missing)).contiguous()
