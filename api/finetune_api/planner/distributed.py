"""What several GPUs add, and what sharding takes away. None of it has been measured on GPUs yet; what sharding gathers in a step was compared
with the storages of a run on a CPU."""

from __future__ import annotations

import re
from enum import StrEnum

from finetune_api.base import ApiModel
from finetune_api.planner.activations import StepMemory
from finetune_api.planner.architecture import Architecture

LAYER = re.compile(r"\.(\d+)\.")
FULL = 4
NCCL_BYTES = 300 << 20
"""Buffers of NCCL's channels (NCCL_BUFFSIZE 4 MiB × channels × peers); an allowance."""


class Layout(StrEnum):
    """How the work is laid out over GPUs."""

    SINGLE = "Single"
    DDP = "DDP"
    FSDP = "FSDP"
    CPU_OFFLOAD = "CPUOffload"
    """As FSDP, also with one GPU, and the GPU's part of the base lies in host memory."""


class Moment(ApiModel):
    """A time within a step: what is there then, beside what is held between steps."""

    own_bytes: int
    """As on a single GPU."""
    gathered_bytes: int = 0
    """Sharded units put together."""
    message_bytes: int = 0
    """What collectives send from and receive into."""

    @property
    def bytes(self) -> int:
        """All of it."""
        return self.own_bytes + self.gathered_bytes + self.message_bytes


class Communication(ApiModel):
    """Bytes per GPU that only exist with several, or with a base in host memory."""

    layer_bytes: int = 0
    """The largest layer, put together."""
    end_bytes: int = 0
    """The larger of embeddings and head, put together; 0 where they are tied, and whole anyway."""
    part_bytes: int = 0
    """This GPU's part of a layer, which comes from host memory before it is sent."""
    head_stays: bool = False
    """The head is called by the model itself, and let go with the next batch only (finetune_trainer.train.loss)."""
    gradient_bytes: int = 0
    """The adapter's gradients in the message that adds them up, when no activations are left."""
    buffer_bytes: int = 0
    """Always there."""

    def decisive(self, step: StepMemory) -> Moment:
        """When a micro-batch needs the most.

        FSDP2 (torch 2.15) gathers a unit into one message and copies its tensors out of that. While a layer computes, the message of the
        next one is there. Embeddings and head are gathered when nothing else is (finetune_trainer.train.sharded), and their message is
        gone before they compute; the head is let go before the layers' backward pass.
        """
        layer, end, kept = self.layer_bytes, self.end_bytes, step.kept_bytes
        stays = end if self.head_stays else 0
        moments = [
            Moment(
                own_bytes=kept + step.working_bytes, gathered_bytes=layer + stays, message_bytes=layer + self.part_bytes
            ),
            Moment(own_bytes=kept + step.loss_bytes, gathered_bytes=end),
            Moment(own_bytes=kept, gathered_bytes=end, message_bytes=end),
            Moment(own_bytes=0, message_bytes=self.gradient_bytes),
        ]
        return max(moments, key=lambda moment: moment.bytes)

    @property
    def evaluation_bytes(self) -> int:
        """The most that is gathered and sent without gradients, whenever that is."""
        return 2 * max(self.layer_bytes, self.end_bytes) + self.part_bytes

    @property
    def loading_bytes(self) -> int:
        """While units are read and shared out: the one at work, and another (finetune_trainer.train.sharded; over gloo a test holds each rank's
        tensors to its part and two units)."""
        return self.layer_bytes + max(self.layer_bytes, self.end_bytes)


def communication(
    layout: Layout, weights: dict[str, int], trainable: int, gpus: int, arch: Architecture
) -> Communication:
    """Zhao et al. 2023 (PyTorch FSDP): with units of one layer each, embeddings and head units of their own. DDP here has a whole copy on each GPU
    and one message of all gradients beside them (finetune_trainer.train.ranks), not torch's buckets.

    Args:
        weights: bytes of each tensor of the base as it is sharded.
        trainable: parameters of the adapter, whose float32 gradients are added up in one flat message.
    """
    if layout is Layout.SINGLE:
        return Communication()
    if layout is Layout.DDP:
        return Communication(buffer_bytes=FULL * trainable + NCCL_BYTES)
    layers: dict[str, int] = {}
    for name, size in weights.items():
        if found := LAYER.search(name):
            layers[found[1]] = layers.get(found[1], 0) + size
    layer = max(layers.values())
    ends = [] if arch.tied_embeddings else [size for name, size in weights.items() if not LAYER.search(name)]
    return Communication(
        layer_bytes=layer,
        end_bytes=max(ends, default=0),
        part_bytes=-(-layer // gpus) if layout is Layout.CPU_OFFLOAD else 0,
        head_stays=arch.logits_changed,
        gradient_bytes=FULL * trainable,
        buffer_bytes=NCCL_BYTES,
    )


def sharded(weights: dict[str, int], layout: Layout, gpus: int, tied: bool) -> int:
    """A GPU's part of the base, as far as it stays there. Tied embeddings are needed at both ends, and are whole on every GPU; vectors are too, which are too
    small to show."""
    if layout not in (Layout.FSDP, Layout.CPU_OFFLOAD):
        return sum(weights.values())
    whole = sum(size for name, size in weights.items() if tied and not LAYER.search(name))
    return whole + (0 if layout is Layout.CPU_OFFLOAD else -(-(sum(weights.values()) - whole) // gpus))


def offloaded(weights: dict[str, int], gpus: int, tied: bool) -> list[int]:
    """Bytes of each tensor of a GPU's part of the base that lies in host memory."""
    return [-(-size // gpus) for name, size in weights.items() if LAYER.search(name) or not tied]


def pinned(sizes: list[int]) -> int:
    """Host memory that tensors of these sizes take when it is pinned: torch takes a power of two for each (CachingHostAllocator)."""
    return sum(1 << (size - 1).bit_length() for size in sizes if size)
