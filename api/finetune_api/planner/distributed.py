"""What several GPUs add, and what sharding takes away. Analytic: none of it has been measured on GPUs yet."""

from __future__ import annotations

import re
from enum import StrEnum

from finetune_api.base import ApiModel

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


class Communication(ApiModel):
    """Bytes per GPU that only exist with several."""

    gathered_bytes: int
    """Sharded units put together for their forward or backward pass: the one at work and the next (FSDP2 prefetches one)."""
    buffer_bytes: int
    """Copies that collectives send from and receive into."""


def communication(layout: Layout, weights: dict[str, int], trainable: int) -> Communication:
    """Zhao et al. 2023 (PyTorch FSDP): with units of one layer each, embeddings and head units of their own.

    Args:
        weights: bytes of each tensor of the base as it is sharded.
        trainable: parameters of the adapter, whose float32 gradients are added up in one flat message.
    """
    if layout is Layout.SINGLE:
        return Communication(gathered_bytes=0, buffer_bytes=0)
    if layout is Layout.DDP:
        return Communication(gathered_bytes=0, buffer_bytes=FULL * trainable + NCCL_BYTES)
    units: dict[str, int] = {}
    for name, size in weights.items():
        found = LAYER.search(name)
        unit = found[1] if found else name
        units[unit] = units.get(unit, 0) + size
    layer = max(size for unit, size in units.items() if unit.isdigit())
    outside = max((size for unit, size in units.items() if not unit.isdigit()), default=0)
    gathered = layer + max(layer, outside)
    # What all-gather wrote is kept until the next unit's was copied out of it (torch 2.15: wait_for_unshard), the head's until the
    # backward pass is over. When the gradients are added up, nothing is gathered.
    buffers = max(max(layer, outside), FULL * trainable - gathered) + NCCL_BYTES
    return Communication(gathered_bytes=gathered, buffer_bytes=buffers)


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
