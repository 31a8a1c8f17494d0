"""Quantized and back: base weights as training saw them, proven by the records that training left."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, quantize_4bit, quantize_blockwise

from finetune_api.failures import Reason
from finetune_api.results import QuantizedModule
from finetune_api.spec import Quantization
from finetune_trainer.errors import StageError
from finetune_trainer.train import int8
from finetune_trainer.train.quantized import describe, describe_int8

BLOCK_WEIGHTS = 64
BLOCK_CONSTANTS = 256
SAMPLE_SHARE = 0.95
"""Share of the sampled codes that must agree within one step. Of another weight's 4-bit codes about a fifth do, of its 8-bit codes fewer."""
CONSTANTS_TOLERANCE = 1e-3
"""Largest relative difference of the mean block constant."""


class RoundTrip:
    """Quantizes and dequantizes exactly the modules that training held quantized, and checks each against its record.

    A record's SHA-256 covers the quantized weights and all constants. Where it matches, the weights are training's, bit for
    bit; that is the rule when both stages ran on CPUs. A GPU's kernels may break a tie the other way (they multiply by the
    reciprocal where the CPU divides), so a mismatch is accepted with a warning if sampled codes and the mean constant agree
    as only the same weights' do. What it means for the model is then for the merge check to say.
    """

    def __init__(self, quantization: Quantization, records: list[QuantizedModule], dtype: torch.dtype) -> None:
        self._quantization = quantization
        self._dtype = dtype
        self._records = {r.name: r for r in records}
        self.inexact: set[str] = set()

    @property
    def modules(self) -> frozenset[str]:
        """The modules that were quantized."""
        return frozenset(self._records)

    def __call__(self, module: str, weight: torch.Tensor) -> torch.Tensor:
        """``weight`` after the round trip, in the type that training loaded it in.

        Raises:
            StageError: VerificationFailed, if training used another weight.
        """
        record = self._records[module]
        if self._quantization.bits == 8:
            codes, scales = int8.quantized(weight.to(self._dtype))
            self._compare(describe_int8(module, codes, scales), record)
            return int8.dequantized(codes, scales, self._dtype)
        packed, state = quantize_4bit(
            weight.to(self._dtype).contiguous(),
            blocksize=BLOCK_WEIGHTS,
            compress_statistics=False,
            quant_type=self._quantization.type.value.lower(),
        )
        if record.offset is not None:
            state = double_quantized(state, record.offset)
        self._compare(describe(module, packed, state), record)
        return dequantize_4bit(packed, state)  # type: ignore[no-any-return]

    def _compare(self, found: QuantizedModule, record: QuantizedModule) -> None:
        if found.sha256 == record.sha256:
            return
        agreeing = agreement(found.codes_sample, record.codes_sample, self._quantization.bits)
        constants = abs(found.constants_mean - record.constants_mean) / max(abs(record.constants_mean), 1e-12)
        if agreeing < SAMPLE_SHARE or constants > CONSTANTS_TOLERANCE:
            raise StageError(
                Reason.VERIFICATION_FAILED,
                f"{record.name} quantizes to other values than in training: {100 * agreeing:.0f} % of the sampled codes agree, "
                f"the mean constant is {found.constants_mean:.3g} instead of {record.constants_mean:.3g}.",
            )
        self.inexact.add(record.name)


def agreement(first: str, second: str, bits: int) -> float:
    """Share of two samples' codes (4 bit: one hexadecimal digit each; 8 bit: two, signed) that differ by at most one step."""
    if len(first) != len(second):
        return 0.0
    one, other = (_codes(sample, bits) for sample in (first, second))
    return sum(abs(a - b) <= 1 for a, b in zip(one, other, strict=True)) / len(one)


def _codes(sample: str, bits: int) -> list[int]:
    if bits == 4:
        return [int(digit, 16) for digit in sample]
    return [int.from_bytes([byte], signed=True) for byte in bytes.fromhex(sample)]


def double_quantized(state: Any, offset: float) -> Any:
    """Quantize the constants with a given offset, otherwise as bitsandbytes' ``compress_statistics`` does."""
    mean = torch.tensor(offset, dtype=torch.float32)
    absmax, state2 = quantize_blockwise(state.absmax - mean, blocksize=BLOCK_CONSTANTS)
    return QuantState(
        absmax=absmax,
        shape=state.shape,
        dtype=state.dtype,
        blocksize=state.blocksize,
        code=state.code,
        quant_type=state.quant_type,
        offset=mean,
        state2=state2,
    )
