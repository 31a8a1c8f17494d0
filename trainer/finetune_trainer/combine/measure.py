"""How far the combined adapter is from the weighted sum of the adapters: computed in float64, by other means than it was made with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from finetune_api.combination import CombinationError
from finetune_api.failures import Reason
from finetune_trainer.combine.files import modules_of, parts_of
from finetune_trainer.combine.methods import Part
from finetune_trainer.combine.sources import Source
from finetune_trainer.errors import StageError
from finetune_trainer.publish.adapter import Adapter, Lora

TOLERANCE = 1e-5
"""Of the adapters' own size: float32 rounds to 6e-8, and sums of some hundred products lose a digit."""


@dataclass(frozen=True)
class Distance:
    """Frobenius norms of one module."""

    off: float
    """Of the difference between the result and the weighted sum."""
    total: float
    """Of the weighted sum."""
    size: float
    """Of the weighted updates, added up: what rounding is relative to."""


def norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """‖B A‖ without the product: √ of the trace of (BᵀB)(AAᵀ)."""
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def distance(result: Lora, parts: list[Part]) -> Distance:
    """Of one module."""
    halves = [(p.lora.b.double(), p.lora.a.double() * p.factor) for p in parts]
    b = torch.cat([half for half, _ in halves], dim=1)
    a = torch.cat([half for _, half in halves])
    off = norm(torch.cat([b, -result.b.double()], dim=1), torch.cat([a, result.a.double() * result.scaling]))
    return Distance(off, norm(b, a), sum(norm(*half) for half in halves))


def measure(result: Adapter, sources: list[Source], left_out: dict[str, float]) -> CombinationError:
    """Of all modules.

    Args:
        left_out: norm of what the rank could not hold, by module; empty for types that do not mean the sum.

    Raises:
        StageError: VerificationFailed, if it is another adapter, or not the sum that it should be.
    """
    shapes = modules_of(sources)
    if result.modules.keys() != shapes.keys():
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the adapter in the bucket has {len(result.modules)} modules; {len(shapes)} were written.",
        )
    off = total = 0.0
    largest, where = -1.0, ""
    for module in shapes:
        found = distance(result.lora(module), parts_of(sources, module))
        if left_out and abs(found.off - left_out[module]) > TOLERANCE * found.size:
            raise StageError(
                Reason.VERIFICATION_FAILED,
                f"{module} of the adapter in the bucket is {found.off:.3g} from the weighted sum (Frobenius norm {found.total:.3g}); expected {left_out[module]:.3g}.",
            )
        relative = _relative(found.off, found)
        if relative > largest:
            largest, where = relative, module
        off, total = math.hypot(off, found.off), math.hypot(total, found.total)
    exact = is_exact(left_out, total)
    return CombinationError(
        whole=off / total if total else 0.0,
        largest=largest,
        module=where,
        tolerance=TOLERANCE if exact else None,
    )


def is_exact(left_out: dict[str, float], total: float) -> bool:
    """Whether nothing but rounding may separate the result from the weighted sum."""
    return bool(left_out) and math.hypot(*left_out.values()) <= TOLERANCE * total


def _relative(off: float, found: Distance) -> float:
    """To the sum; where the updates cancel each other, to what rounding leaves of them."""
    whole = max(found.total, TOLERANCE * found.size)
    return off / whole if whole else 0.0
