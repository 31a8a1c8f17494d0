"""Whether the merged files hold base + adapter, tensor by tensor: read back, and compared with what rounding leaves of the sum.

The held-out loss alone cannot tell: rounding to bfloat16 moves it by as much as a short training does, so a merge that lost a
small adapter, or one module of a large one, would pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.publish.adapter import Adapter, Lora
from finetune_trainer.publish.merge import BaseWeights
from finetune_trainer.publish.safetensors_stream import Checkpoint, TensorInfo, module_of, rows_per_chunk

SLACK = 1e-5
"""Relative to |W| + scaling·|B|·|A|: merge and check sum in float32 in another order, 2⁻²⁴ an operation, up to some hundred ranks."""
CHECK_BYTES = 2 << 20
"""Float32 values compared at a time."""
NAMED = 3
TOO_LARGE = (
    " Some values are larger than the largest number of their type: set output.merged.dtype to bfloat16 or float32."
)


@dataclass
class Written:
    """How one tensor compares: elements that are farther from the exact sum than rounding explains, and the update's whereabouts."""

    elements: int = 0
    wrong: int = 0
    overflowed: int = 0
    """Of the wrong ones, those whose exact sum is larger than the largest number of the file's type."""
    arrived: float = 0.0
    """Σ (W' − W) · ΔW."""
    update: float = 0.0
    """Σ ΔW²."""

    @property
    def share(self) -> float:
        """Share of the update that stands in the file: 1 if all, 0 if it was lost (rounding moves it a little either way)."""
        return self.arrived / self.update if self.update else 0.0


def check_written(base: BaseWeights, adapter: Adapter, folder: Path) -> None:
    """Compare every tensor in ``folder`` with base + adapter. Memory holds a few rows of one tensor.

    An element passes if it is as near to W + ΔW as the nearest number of its type is. So an update that rounding swallows
    passes, for there is nothing of it to be written, and any other must be there.

    Raises:
        StageError: VerificationFailed.
    """
    merged = Checkpoint(folder)
    missing = sorted(set(base.checkpoint.tensors) ^ set(merged.tensors))
    if missing:
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the merged model and the base have not the same tensors: {', '.join(missing[:NAMED])} stands in one of them only.",
        )
    wrong: list[str] = []
    overflowed = False
    for name, info in merged.tensors.items():
        result = compare_tensor(base, adapter, merged, info)
        if result.wrong:
            update = f", {100 * result.share:.0f} % of its update arrived" if result.update else ""
            wrong.append(f"{name} ({result.wrong:,} of {result.elements:,} values{update})")
            overflowed |= bool(result.overflowed)
    if wrong:
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{len(wrong)} of {len(merged.tensors)} tensors of the merged model are not {adapter.words} within rounding: "
            f"{', '.join(wrong[:NAMED])}.{TOO_LARGE if overflowed else ''}",
        )


def compare_tensor(base: BaseWeights, adapter: Adapter, merged: Checkpoint, info: TensorInfo) -> Written:
    """One tensor of the merged model against the exact sum."""
    name = info.name
    result = Written()
    if info.dtype is None:
        found, original = merged.read(name), base.checkpoint.read(name)
        return Written(found.numel(), 0 if torch.equal(found, original) else found.numel())
    if name in adapter.tokens:
        return compare_token_rows(base, adapter, merged, name)
    parts = adapter.replaced_rows(name) if name in adapter.replaced else base.rows(name)
    written = merged.read_rows(name)
    lora = adapter.lora(module_of(name)) if name.endswith(".weight") and module_of(name) in adapter.modules else None
    if lora is not None and base.is_turned(name):
        parts, written = iter([(0, base.read(name).T)]), iter([(0, merged.read(name).T)])
    for (start, rows), (_, found) in zip(parts, written, strict=True):
        # A few rows at a time: there are ten float32 values here for each element.
        step = rows_per_chunk(tuple(rows.shape), CHECK_BYTES)
        for at in range(0, len(rows), step):
            weight = rows[at : at + step].float()
            part = lora.rows(start + at, len(weight)) if lora else None
            _compare(result, weight, found[at : at + step], part)
    return result


def compare_token_rows(base: BaseWeights, adapter: Adapter, merged: Checkpoint, name: str) -> Written:
    """An embedding of which some rows are trained: those against the adapter's, one by one, the others against the base's."""
    ids, result = adapter.tokens[name], Written()
    rows, width = base.checkpoint.tensors[name].shape
    expected = (max(rows, ids[-1] + 1), width)
    if merged.tensors[name].shape != expected:
        return Written(math.prod(expected), math.prod(expected))
    for start, part in base.rows(name):
        kept = [i for i in range(len(part)) if start + i not in ids]
        _compare(result, part[kept].float(), merged.read_range(name, start, start + len(part))[kept], None)
    found = torch.cat([merged.read_range(name, i, i + 1) for i in ids])
    _compare(result, adapter.token_rows(name), found, None)
    return result


def _compare(result: Written, weight: torch.Tensor, found: torch.Tensor, lora: Lora | None) -> None:
    """Add some rows to the result: W (float32), W', and their update."""
    exact, summands = weight, weight.abs()
    if lora is not None:
        a = lora.scaling * lora.a
        exact = weight + lora.b @ a
        summands += lora.b.abs() @ a.abs()
        if lora.magnitude is not None:
            size = exact.double().pow(2).sum(dim=1).sqrt().float()
            factor = (lora.magnitude / size)[:, None]
            exact, summands = exact * factor, summands * factor.abs()
    delta = exact - weight
    off = (found.float() - exact).abs()
    nearest = (exact.to(found.dtype).float() - exact).abs()
    # "not …": NaN counts as wrong. Infinite is as near as the nearest number of its type, and wrong.
    finite = found.isfinite()
    result.wrong += int((~(off <= nearest + SLACK * summands) | ~finite).sum())
    result.overflowed += int((exact.abs() > torch.finfo(found.dtype).max).sum())
    result.elements += found.numel()
    result.arrived += float(((found.float() - weight) * delta).sum(dtype=torch.float64))
    result.update += float((delta * delta).sum(dtype=torch.float64))
