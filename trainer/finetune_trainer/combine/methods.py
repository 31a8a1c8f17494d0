"""What becomes of one module: peft's ``add_weighted_adapter`` (0.21, tuners/lora/model.py), on plain tensors.

The result's scaling is 1: the adapters' own scalings are in its matrices.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from peft.utils import merge_utils

from finetune_api.spec import AdapterCombinationSpec, CombinationType, MajoritySign
from finetune_trainer.publish.adapter import Lora

Merge = Callable[[list[torch.Tensor], torch.Tensor], torch.Tensor]
SUMS = (CombinationType.CAT, CombinationType.SVD)
"""Types that mean the weighted sum of the updates; the others combine A with A and B with B."""


@dataclass(frozen=True)
class Part:
    """An adapter's update of the module, and its weight."""

    lora: Lora
    weight: float

    @property
    def factor(self) -> float:
        """By what B · A is multiplied."""
        return self.weight * self.lora.scaling


@dataclass(frozen=True)
class Combined:
    """A (rank, inputs) and B (outputs, rank), float32."""

    a: torch.Tensor
    b: torch.Tensor
    left_out: float | None
    """Frobenius norm of what the rank could not hold of the weighted sum; None for types that do not mean the sum."""


def highest_rank(spec: AdapterCombinationSpec, ranks: dict[str, list[int]]) -> int:
    """The rank of the result. ``ranks``: of the adapters that have each module."""
    if spec.type is CombinationType.CAT:
        return max(sum(of_module) for of_module in ranks.values())
    return spec.rank or max(max(of_module) for of_module in ranks.values())


def combine(spec: AdapterCombinationSpec, module: str, parts: list[Part], rank: int) -> Combined:
    """One module; ``parts`` are those of the adapters that have it, in their order."""
    if spec.type is CombinationType.CAT:
        b, a = _stacked(parts)
        result = Combined(a, b, 0.0)
    elif spec.type is CombinationType.SVD:
        result = _truncated(parts, rank)
    else:
        result = _halves(spec, module, parts)
    missing = rank - len(result.a)
    pad = torch.nn.functional.pad
    return Combined(pad(result.a, (0, 0, 0, missing)), pad(result.b, (0, missing)), result.left_out)


def _stacked(parts: list[Part]) -> tuple[torch.Tensor, torch.Tensor]:
    """B and A whose product is the weighted sum."""
    return torch.cat([p.lora.b for p in parts], dim=1), torch.cat([p.lora.a * p.weight * p.lora.scaling for p in parts])


def _truncated(parts: list[Part], rank: int) -> Combined:
    """The first singular values of the weighted sum, which is never made: B = Q₁R₁ and Aᵀ = Q₂R₂, so BA = Q₁ (R₁R₂ᵀ) Q₂ᵀ."""
    b, a = _stacked(parts)
    q1, r1 = torch.linalg.qr(b.double())
    q2, r2 = torch.linalg.qr(a.double().T)
    u, s, vh = torch.linalg.svd(r1 @ r2.T, full_matrices=False)
    left = (q1 @ u[:, :rank]) * s[:rank]
    right = vh[:rank] @ q2.T
    return Combined(right.float(), left.float(), float(torch.linalg.vector_norm(s[rank:])))


def _halves(spec: AdapterCombinationSpec, module: str, parts: list[Part]) -> Combined:
    """A and B each by themselves, with √|weight · scaling|, and the sign on A alone."""
    roots = [math.sqrt(abs(p.factor)) for p in parts]
    signed = [math.copysign(root, p.factor) for root, p in zip(roots, parts, strict=True)]
    merge = _merge_of(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_seed_of(spec.seed or 0, module))
        a = merge([p.lora.a for p in parts], torch.tensor(signed))
        b = merge([p.lora.b for p in parts], torch.tensor(roots))
    return Combined(a, b, None)


def _merge_of(spec: AdapterCombinationSpec) -> Merge:
    """peft's function for a type."""
    sign = (spec.majority_sign or MajoritySign.TOTAL).value.lower()
    merges: dict[CombinationType, Merge] = {
        CombinationType.LINEAR: merge_utils.task_arithmetic,
        CombinationType.MAGNITUDE_PRUNE: partial(merge_utils.magnitude_prune, density=spec.density),
        CombinationType.DARE_LINEAR: partial(merge_utils.dare_linear, density=spec.density),
        CombinationType.TIES: partial(merge_utils.ties, density=spec.density, majority_sign_method=sign),
        CombinationType.DARE_TIES: partial(merge_utils.dare_ties, density=spec.density, majority_sign_method=sign),
    }
    return merges[spec.type]


def _seed_of(seed: int, module: str) -> int:
    """Of a module's draws: none repeats another's, and their order does not matter."""
    return int.from_bytes(hashlib.sha256(f"{seed} {module}".encode()).digest()[:8], "big") >> 1
