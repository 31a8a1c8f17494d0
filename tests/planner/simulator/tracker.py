"""How many bytes of tensors are alive, and the most there ever were."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.distributed.tensor import DTensor
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


class ResizedStorages(LiveStorages):
    """Sees also what FSDP does: it empties a storage, which lives on, and fills it again."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def count(self, size: int) -> int:
        """How many storages of so many bytes are alive and filled."""
        return sum((storage := made()) is not None and storage.nbytes() == size for made in self._storages.values())

    def add(self, tensor: torch.Tensor) -> None:
        """Count the tensor's storage as large as it is whenever an operator has run. A distributed tensor's part is seen by itself."""
        if not isinstance(tensor, DTensor) and tensor.device.type != "meta":
            storage = tensor.untyped_storage()
            self._storages[storage._cdata] = weakref.ref(storage)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run the operator, and measure."""
        out = super().__torch_dispatch__(func, types, args, kwargs)
        alive = [storage for made in self._storages.values() if (storage := made()) is not None]
        self._storages = {storage._cdata: weakref.ref(storage) for storage in alive}
        self.live_bytes = sum(rounded(storage.nbytes()) for storage in alive)
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return out
