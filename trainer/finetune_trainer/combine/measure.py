"""How far the combined adapter is from the weighted sum of the adapters: computed in float64, by other means than it was made with."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from finetune_api.combination import CombinationError
from finetune_api.failures import Reason
from finetune_api.spec import AdapterCombinationSpec
from finetune_trainer.combine.files import modules_of, parts_of
from finetune_trainer.combine.methods import Part, combine
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
    own: float
    """Of the result."""
    total: float
    """Of the weighted sum."""
    size: float
    """Of the weighted updates, added up: what rounding is relative to."""

    def is_best(self, left_out: float) -> bool:
        """Whether the result is the weighted sum but for ``left_out``: the rest of a singular value decomposition is at a right angle to what
        is kept. The distance alone would not do: near the best adapter it hardly grows."""
        kept = math.sqrt(max(0.0, self.total**2 - left_out**2))
        return max(abs(self.off - left_out), abs(self.own - kept)) <= TOLERANCE * self.size


def norm(b: torch.Tensor, a: torch.Tensor) -> float:
    """‖B A‖ without the product: √ of the trace of (BᵀB)(AAᵀ)."""
    return math.sqrt(max(0.0, float(((b.T @ b) * (a @ a.T)).sum())))


def distance(result: Lora, parts: list[Part]) -> Distance:
    """Of one module."""
    halves = [(p.lora.b.double(), p.lora.a.double() * p.factor) for p in parts]
    b = torch.cat([half for half, _ in halves], dim=1)
    a = torch.cat([half for _, half in halves])
    own_b, own_a = result.b.double(), result.a.double() * result.scaling
    off = norm(torch.cat([b, -own_b], dim=1), torch.cat([a, own_a]))
    return Distance(off, norm(own_b, own_a), norm(b, a), sum(norm(*half) for half in halves))


def measure(
    spec: AdapterCombinationSpec, result: Adapter, sources: list[Source], rank: int, left_out: dict[str, float]
) -> CombinationError:
    """Of all modules.

    Args:
        rank: of the result.
        left_out: norm of what the rank could not hold, by module; empty for types that do not mean the sum: their result is computed again.

    Raises:
        StageError: VerificationFailed, if it is another adapter, or not what it should be.
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
        lora, parts = result.lora(module), parts_of(sources, module)
        found = distance(lora, parts)
        if not left_out:
            must_be_made_of(lora, spec, module, parts, rank)
        if left_out and not found.is_best(left_out[module]):
            raise StageError(
                Reason.VERIFICATION_FAILED,
                f"{module} of the adapter in the bucket has Frobenius norm {found.own:.6g} and is {found.off:.6g} from the weighted sum, whose norm is {found.total:.6g}; expected a distance of {left_out[module]:.6g}.",
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


def must_be_made_of(lora: Lora, spec: AdapterCombinationSpec, module: str, parts: list[Part], rank: int) -> None:
    """One module is what its type makes of the adapters, number by number: what is drawn at random is drawn the same again.

    Raises:
        StageError: VerificationFailed.
    """
    made = combine(spec, module, parts, rank)
    if lora.scaling != 1.0 or not (torch.equal(lora.a, made.a) and torch.equal(lora.b, made.b)):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{module} of the adapter in the bucket has Frobenius norm {norm(lora.b.double(), lora.a.double() * lora.scaling):.6g}; {spec.type.value} "
            f"computed again gives other numbers, of norm {norm(made.b.double(), made.a.double()):.6g}.",
        )


def is_exact(left_out: dict[str, float], total: float) -> bool:
    """Whether nothing but rounding may separate the result from the weighted sum."""
    return bool(left_out) and math.hypot(*left_out.values()) <= TOLERANCE * total


def _relative(off: float, found: Distance) -> float:
    """To the sum; where the updates cancel each other, to what rounding leaves of them."""
    whole = max(found.total, TOLERANCE * found.size)
    return off / whole if whole else 0.0
