"""Full weights on a GPU: float32 masters, their gradients, what the optimizer keeps, and what their products need. Not compared with simulated
runs: upper bounds where it is not exact."""

from __future__ import annotations

import math

from finetune_api.full_weights import UnknownModule, stand_ins
from finetune_api.planner.linears import Linear, UnknownTarget
from finetune_api.planner.tensors import EMBEDDING, HEAD, Shapes
from finetune_api.planner.weights import FULL, HALF, optimizer_bytes
from finetune_api.planner.workload import Tuning

FOREACH = ("adamw_torch", "adagrad", "sgd", "rmsprop", "schedule_free_adamw", "schedule_free_radam")
"""Optimizers that compute with temporaries of all weights at once (foreach, of torch.optim and schedulefree); the fused one has none."""


def trained(shapes: Shapes, tuning: Tuning) -> Shapes:
    """The tensors that are trained, or others of the same shapes (Spectrum's choice needs the weights); none with an adapter.

    Raises:
        UnknownTarget: modules name nothing.
    """
    if tuning.full is None:
        return {}
    try:
        return {name: shapes[name] for name in stand_ins(shapes, tuning.full)}
    except UnknownModule as error:
        raise UnknownTarget(str(error)) from error


def trained_linears(chosen: Shapes, linears: list[Linear]) -> list[Linear]:
    """Those of the linear layers that are among the tensors that are trained."""
    return [layer for layer in linears if f"{layer.name}.weight" in chosen]


def state_bytes(optimizer: str, chosen: Shapes, linears: list[Linear], tuning: Tuning) -> int:
    """What the optimizer keeps, and its temporaries of all weights.

    GaLore (Zhao et al., 2024, table 1): for a matrix of m × n, m ≥ n, projected to rank r two moments of m × r and the projection n × r.
    """
    total = sum(math.prod(shape) for shape in chosen.values())
    if tuning.galore_rank is not None:
        sides = [(max(t.inputs, t.outputs), min(t.inputs, t.outputs)) for t in linears]
        projected = [(m, n) for m, n in sides if tuning.galore_rank < n]
        rest = total - sum(m * n for m, n in projected)
        return 2 * FULL * rest + sum(FULL * tuning.galore_rank * (2 * m + n) for m, n in projected)
    embedding = sum(math.prod(shape) for name, shape in chosen.items() if EMBEDDING.search(name))
    return optimizer_bytes(optimizer, total, embedding) + (FULL * total if optimizer in FOREACH else 0)


def update_bytes(optimizer: str, chosen: Shapes, linears: list[Linear], tuning: Tuning) -> int:
    """Temporaries of optimizers that go a tensor at a time. StableAdamW's are two as large as the weight.

    GaLore's: an update as large as the weight; when a matrix of m × n, m ≥ n, is decomposed the scaled gradient with its Gram matrix (n × n), and
    that with its eigenvectors and the solver's workspace (LAPACK's syevd: 2 n²).
    """
    if optimizer == "stable_adamw":
        return 2 * FULL * max(math.prod(shape) for shape in chosen.values())
    if tuning.galore_rank is None:
        return 0
    sides = [(max(t.inputs, t.outputs), min(t.inputs, t.outputs)) for t in linears]
    decomposed = [max(m * n + n * n, 4 * n * n) for m, n in sides if tuning.galore_rank < n]
    return FULL * max([math.prod(shape) for shape in chosen.values()] + decomposed)


def product_bytes(chosen: Shapes) -> int:
    """While one weight's gradient is made: its half-precision copy, the gradient of that, and the same in float32."""
    return (2 * HALF + FULL) * max((math.prod(shape) for shape in chosen.values()), default=0)


def head_bytes(chosen: Shapes, tied: bool) -> int:
    """The same of the output head, which is there while logits are."""
    return product_bytes(
        {n: s for n, s in chosen.items() if HEAD.search(n) or (tied and EMBEDDING.search(n) and len(s) == 2)}
    )
