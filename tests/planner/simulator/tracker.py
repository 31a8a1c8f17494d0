"""How many bytes of tensors are alive, and the most there ever were."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

BLOCK_BYTES = 512
"""CUDA's caching allocator rounds each request up to this (kMinBlockSize in CUDACachingAllocator.cpp)."""


def rounded(size: int) -> int:
    """Bytes as the allocator hands them out."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


class LiveStorages(TorchDispatchMode):
    """Counts each storage once, from the operator that made it until the last tensor on it is gone.

    That is what ``torch.cuda.max_memory_allocated`` counts. Memory that a kernel takes and returns within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._sizes: dict[int, int] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage, unless it is counted already. On the meta device there is none."""
        if tensor.device.type == "meta":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return
        size = rounded(storage.nbytes())
        self._sizes[key] = size
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._remove, key)

    def reset_peak(self) -> None:
        """Begin a new maximum."""
        self.peak_bytes = self.live_bytes

    def _remove(self, key: int) -> None:
        self.live_bytes -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator and look at what it returns."""
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        return out
