"""Where to compute, and in which type."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_api.failures import Reason
from finetune_api.spec import ComputeDtype, Training
from finetune_api.spec.training import NO_BFLOAT16
from finetune_trainer.cpus import usable_cpus
from finetune_trainer.errors import StageError
from finetune_trainer.text import plural

DTYPES = {
    ComputeDtype.BFLOAT16: torch.bfloat16,
    ComputeDtype.FLOAT16: torch.float16,
    ComputeDtype.FLOAT32: torch.float32,
}


@dataclass(frozen=True)
class Compute:
    """A device, the type of the frozen base on it, and of the products."""

    device: torch.device
    dtype: torch.dtype
    name: str
    keep_copies: bool = True
    """Whether copies of float32 weights in ``dtype`` are kept for a whole pass: cheap for an adapter's, not for the model's own."""

    def autocast(self) -> AbstractContextManager[None]:
        """Matrix products in ``dtype``, whatever the trainables are kept in. Used alike for training, evaluation and answers."""
        return torch.autocast(
            self.device.type, self.dtype, enabled=self.dtype is not torch.float32, cache_enabled=self.keep_copies
        )

    def peak_bytes(self) -> int | None:
        """The most that tensors have held on the GPU in this process; None on a CPU."""
        return torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None


def pick_compute(training: Training) -> Compute:
    """The CPU if asked for, otherwise the first GPU, and the type that is asked for or suits it.

    Raises:
        StageError: NoGPU; InvalidConfig, for a GPU that lacks the type.
    """
    asked = training.compute_dtype
    if training.use_cpu:
        use_all_cpus()
        dtype = cpu_dtype() if asked is ComputeDtype.AUTO else DTYPES[asked]
        return Compute(torch.device("cpu"), dtype, f"cpu ({plural(torch.get_num_threads(), 'thread')})")
    if not torch.cuda.is_available():
        raise StageError(Reason.NO_GPU, f"the training container sees no GPU: {what_was_found()}.")
    torch.cuda.set_device(0)
    name, has_bfloat16 = torch.cuda.get_device_name(0), torch.cuda.is_bf16_supported(including_emulation=False)
    return Compute(torch.device("cuda", 0), gpu_dtype(asked, has_bfloat16, name), name)


def gpu_dtype(asked: ComputeDtype, has_bfloat16: bool, gpu: str) -> torch.dtype:
    """As asked for. Auto: a GPU without bfloat16 (before Ampere) gets float16 with loss scaling.

    Raises:
        StageError: InvalidConfig.
    """
    if asked is ComputeDtype.AUTO:
        return torch.bfloat16 if has_bfloat16 else torch.float16
    if asked is ComputeDtype.BFLOAT16 and not has_bfloat16:
        raise StageError(Reason.INVALID_CONFIG, NO_BFLOAT16.format(gpu))
    return DTYPES[asked]


def cpu_dtype() -> torch.dtype:
    """bfloat16 where oneDNN multiplies it on this CPU (AVX-512 and newer), otherwise float32.

    On an AVX-512-BF16 core bfloat16 is 2.4 times as fast as float32 at 135M parameters; on one with AVX2 alone a product takes thirty
    times as long as in float32.
    """
    fast = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()  # type: ignore[no-untyped-call]
    return torch.bfloat16 if fast else torch.float32


def use_all_cpus() -> None:
    """As many threads as this container may use, unless its environment (``runtime.env``) says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cpus())


def what_was_found() -> str:
    """What a person would look at first when a GPU is missing."""
    nodes = sorted(p.name for p in Path("/dev").glob("nvidia*"))
    visible = {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES") if k in os.environ}
    return (
        f"torch {torch.__version__} built for CUDA {torch.version.cuda}, cuda.is_available() False, "
        f"{torch.cuda.device_count()} devices, /dev: {', '.join(nodes) or 'no nvidia*'}, "
        f"environment: {visible or 'no *_VISIBLE_DEVICES'}"
    )
