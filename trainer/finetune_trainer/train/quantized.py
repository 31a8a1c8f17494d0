"""What quantized weights training used, recorded so that publish can prove it merges into the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch

from finetune_api.failures import Reason
from finetune_api.results import QuantizedModule
from finetune_trainer.errors import StageError

SAMPLE_BYTES = 64


def quantized_modules(model: Any) -> list[QuantizedModule]:
    """A record of each quantized weight of the model, adapter attached or not, by its name in the bare base."""
    found = [describe(_bare(name), module.weight.data, state) for name, module, state in _linear4bit(model)]
    return found + [
        describe_int8(_bare(name), module.weight.data, module.scales)
        for name, module in model.named_modules()
        if hasattr(module, "scales")
    ]


def must_be_quantized(records: list[QuantizedModule], model: Any) -> None:
    """bitsandbytes has only a warning for a model without layers that it knows.

    Raises:
        StageError: UnsupportedModel, where no weight is quantized.
    """
    if not records:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"bitsandbytes quantized none of the layers of {type(model).__name__}: all of it would be held in 16 bit. Use method.type: LoRA.",
        )


def _bare(name: str) -> str:
    return name.replace("base_model.model.", "", 1).removesuffix(".base_layer")


def describe(name: str, packed: torch.Tensor, state: Any) -> QuantizedModule:
    """One record.

    With double quantization the constants have their mean (``offset``) taken off before they are quantized. A mean is a sum,
    and sums differ in the last bits between CPU and GPU, so the offset is recorded: given it, all else is elementwise.

    Args:
        packed: uint8, two 4-bit values a byte.
        state: bitsandbytes' QuantState.
    """
    digest = hashlib.sha256(_bytes(packed))
    nested = (state.offset, state.state2.absmax, state.state2.code) if state.nested else ()
    for tensor in (state.absmax, state.code, *nested):
        digest.update(_bytes(tensor))
    digest.update(f"{state.quant_type} {state.blocksize} {tuple(state.shape)} {state.dtype}".encode())
    return QuantizedModule(
        name=name,
        sha256=digest.hexdigest(),
        offset=float(state.offset) if state.nested else None,
        constants_mean=float(constants(state).double().mean()),
        codes_sample=sample(packed),
    )


def describe_int8(name: str, codes: torch.Tensor, scales: torch.Tensor) -> QuantizedModule:
    """One record of a weight in 8 bit.

    Args:
        codes: int8.
        scales: float32, one a row.
    """
    digest = hashlib.sha256(_bytes(codes))
    digest.update(_bytes(scales))
    digest.update(f"int8 {tuple(codes.shape)}".encode())
    return QuantizedModule(
        name=name,
        sha256=digest.hexdigest(),
        constants_mean=float(scales.double().mean()),
        codes_sample=sample(codes),
    )


def sample(values: torch.Tensor) -> str:
    """Bytes at evenly spread positions, hexadecimal."""
    codes = values.detach().reshape(-1).view(torch.uint8)
    spread = torch.linspace(0, codes.numel() - 1, min(SAMPLE_BYTES, codes.numel()), dtype=torch.float64).long()
    return _bytes(codes[spread.to(codes.device)]).hex()


def constants(state: Any) -> torch.Tensor:
    """The block constants (largest magnitude of each block of 64 weights) as they will be used: float32."""
    if not state.nested:
        return state.absmax.float()  # type: ignore[no-any-return]
    from bitsandbytes.functional import dequantize_blockwise

    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset  # type: ignore[no-any-return]


def _linear4bit(model: Any) -> Iterator[tuple[str, Any, Any]]:
    for name, module in model.named_modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None and not hasattr(module, "base_layer"):
            assert not getattr(state, "packing_format_for_cpu", False), f"{name} was repacked for inference"
            yield name, module, state


def _bytes(tensor: torch.Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
