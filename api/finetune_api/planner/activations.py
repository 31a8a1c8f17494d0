"""Activations of a whole step: layers, what stands around them, and the loss."""

from __future__ import annotations

from finetune_api.base import ApiModel
from finetune_api.planner.architecture import Architecture
from finetune_api.planner.layer_memory import HALF, LayerMemory, evaluation_mlp, evaluation_working
from finetune_api.planner.loss_memory import evaluation_loss_bytes, training_loss_bytes
from finetune_api.planner.workload import Attention, Batch

FULL = 4
MASK = 1


class StepMemory(ApiModel):
    """Bytes of one micro-batch, beside what is held between micro-batches."""

    kept_bytes: int
    """What the forward pass leaves for the backward pass, in all layers."""
    working_bytes: int
    """The most a layer's forward or backward pass needs beside that (with checkpointing its recomputed activations too)."""
    loss_bytes: int
    """The most head and loss need, which is at another time."""

    @property
    def peak_bytes(self) -> int:
        """The most at one time."""
        return self.kept_bytes + max(self.working_bytes, self.loss_bytes)


def step_memory(arch: Architecture, batch: Batch, layer: LayerMemory, copied: int) -> StepMemory:
    """A training step.

    With gradient checkpointing (Chen et al. 2016) each layer keeps its input only, and one layer at a time is recomputed.
    Without it, autocast's half-precision copies of the adapter are kept as well.

    Args:
        copied: weights of the adapter that autocast makes 16-bit copies of.
    """
    tokens, hidden = batch.tokens, arch.hidden_size
    # the last hidden states (those of learned tokens are copied) and the final norm's float32 input
    around = (HALF + FULL) * hidden * tokens + mask_bytes(arch, batch)
    if batch.gradient_checkpointing:
        kept = arch.layers * layer.input_bytes
        working = layer.kept_bytes + layer.working_bytes
    else:
        kept = arch.layers * layer.kept_bytes + HALF * copied
        working = layer.working_bytes
    return StepMemory(kept_bytes=kept + around, working_bytes=working, loss_bytes=training_loss_bytes(arch, tokens))


def mask_bytes(arch: Architecture, batch: Batch) -> int:
    """Masks shared by all layers, rows × 1 × tokens × tokens each: boolean for sdpa, where there is one, numbers for eager attention; two where
    only some layers slide.

    Source: transformers 5.23, masking_utils (sdpa_mask, and _ignore_causal_mask_sdpa for where there is none; eager_mask, whose numbers are of
    the embeddings' type: counted as float32). Compared with simulated runs.
    """
    kinds = 2 if 0 < arch.sliding_layers < arch.layers else 1
    squares = kinds * batch.micro_batch_sequences * batch.sequence_tokens**2
    if batch.attention_of(arch) is Attention.EAGER:
        return FULL * squares
    return MASK * squares if batch.masked_share(arch) else 0


def forward_bytes(arch: Architecture, batch: Batch, quantized: bool, mlp_adapted: bool, widest_bytes: int) -> int:
    """A layer's forward pass without gradients, with the masks of all: the larger of the MLP or eager attention at its widest
    (:func:`evaluation_working`), and a product with the largest 4-bit weight unpacked, beside half of the MLP and four hidden states.

    Source: transformers 5.23's modelling code under torch.no_grad, operator by operator; bitsandbytes 0.50.2 unpacks a weight for the time of
    its product (functional.dequantize_4bit). Compared with simulated runs.

    Args:
        mlp_adapted: the MLP's layers have adapters.
        widest_bytes: the largest 4-bit weight in half precision; 0 where none is quantized.
    """
    tokens = batch.tokens
    layer = tokens * evaluation_working(arch, batch, quantized, mlp_adapted)
    product = tokens * (evaluation_mlp(arch, quantized, mlp_adapted) / 2 + 4 * HALF * arch.hidden_size) + widest_bytes
    return int(max(layer, product)) + mask_bytes(arch, batch)


def evaluation_bytes(arch: Architecture, batch: Batch, forward: int, copied: int) -> int:
    """A batch of held-out rows (finetune_trainer.train.evaluate): layers, then head and loss; and autocast's half-precision
    copies of the adapter.

    Args:
        forward: what :func:`forward_bytes` says of the batch.
        copied: weights of the adapter that autocast makes 16-bit copies of.
    """
    loss = evaluation_loss_bytes(arch, batch.tokens) + HALF * arch.hidden_size * batch.tokens
    return max(forward, loss) + HALF * copied


def generation_bytes(arch: Architecture, batch: Batch, forward: int, copied: int, new_tokens: int) -> int:
    """Answers to a batch of prompts: the prompts' forward pass beside the keys and values of all layers, two numbers in half precision for each
    token, layer and part of a key head (Pope et al. 2022; transformers 5.23, DynamicCache), and autocast's copies of the adapter.
    Not simulated.

    Args:
        forward: what :func:`forward_bytes` says of the batch.
        copied: weights of the adapter that autocast makes 16-bit copies of.
        new_tokens: of the longest answer.
    """
    cached = batch.micro_batch_sequences * (batch.sequence_tokens + new_tokens) * 2 * HALF * arch.key_value_size
    return forward + arch.layers * cached + HALF * copied
