"""GPUs by the product label that NVIDIA's GPU feature discovery puts on nodes."""

from __future__ import annotations

import functools
import json
from importlib import resources

from finetune_api.base import ApiModel

MIB = 1 << 20
USABLE_SHARE = 0.97
"""Of the memory that a label tells, what a process can allocate: the least of the products in the table."""


class UnknownGpu(ValueError):
    """A product that is not in the table: its memory must be declared."""


class Gpu(ApiModel):
    """One kind of GPU."""

    product: str
    usable_bytes: int
    """What a process can allocate, the CUDA context included."""
    peak_tflops: float | None = None
    """bfloat16, dense."""
    bfloat16: bool = True

    @property
    def name(self) -> str:
        """As a person writes it."""
        return self.product.replace("-", " ")


@functools.cache
def known_gpus() -> tuple[Gpu, ...]:
    """The table (gpus.json), smallest memory first."""
    rows = json.loads(resources.files(__package__).joinpath("gpus.json").read_text(encoding="utf-8"))["gpus"]
    gpus = [
        Gpu(
            product=row["product"],
            usable_bytes=row["usableMiB"] * MIB,
            peak_tflops=row["bf16DenseTflops"],
            bfloat16=row.get("bfloat16", True),
        )
        for row in rows
    ]
    return tuple(sorted(gpus, key=lambda gpu: gpu.usable_bytes))


def labelled_gpu(product: str, memory_mib: int | None) -> Gpu | None:
    """What nodes have, under the name that their label gives it: from the table, or by the label nvidia.com/gpu.memory; None where
    neither tells."""
    try:
        return find_gpu(product).model_copy(update={"product": product})
    except UnknownGpu:
        return None if memory_mib is None else Gpu(product=product, usable_bytes=int(memory_mib * MIB * USABLE_SHARE))


def find_gpu(product: str) -> Gpu:
    """By label or name, with or without the maker: ``NVIDIA-A10G``, ``NVIDIA A10G``, ``a10g``. Labels of shared or sliced GPUs
    (``-SHARED``) are those of the whole GPU.

    Raises:
        UnknownGpu: no such product.
    """
    wanted = product.strip().replace(" ", "-").lower().removesuffix("-shared")
    for gpu in known_gpus():
        label = gpu.product.lower()
        if wanted in (label, label.removeprefix("nvidia-").removeprefix("geforce-"), label.removeprefix("tesla-")):
            return gpu
    raise UnknownGpu(
        f"{product} is not in the table of GPUs: declare its memory. The table has "
        + ", ".join(gpu.product for gpu in known_gpus())
    )
