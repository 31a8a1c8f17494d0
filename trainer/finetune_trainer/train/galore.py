"""GaLore (Zhao et al., 2024): AdamW whose moments live in a few dimensions of each weight matrix's gradient.

Not ``galore-torch`` (1.0): its projections are Python objects in the optimizer's state, which ``torch.load(weights_only=True)`` refuses and which a copy
to host memory leaves on the GPU; each rank makes its own; and it imports bitsandbytes. Here every state is a tensor or a number, so a
checkpoint has all of it, and a resumed run goes on with the same projections.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from finetune_api.spec import GaLore
from finetune_trainer import heartbeat

SameEverywhere = Callable[[torch.Tensor], torch.Tensor]
"""A tensor as the first rank has it."""


class GaLoreAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, 2019); matrices in groups with ``rank`` are projected (algorithm 2 of the paper).

    Args:
        params: groups; those of matrices to project have ``rank``.
        settings: rank, interval and scale of the projection.
        same: how ranks agree on a projection.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
        settings: GaLore, same: SameEverywhere,
    ) -> None:  # fmt: skip
        super().__init__(
            params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "projected": False}
        )
        self._settings = settings
        self._same = same

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step of all parameters that have a gradient."""
        assert closure is None, "a closure is for optimizers that look ahead"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None
        done = int(state.get("step", 0))
        projected = group["projected"] and self._settings.rank < min(parameter.shape)
        if projected:
            if done % self._settings.update_interval_steps == 0:
                heartbeat.beat()  # a step that decomposes every matrix takes minutes
                state["projection"] = self._same(projection(gradient, self._settings.rank))
            gradient = project(gradient, state["projection"])
        if not done:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        beta1, beta2 = group["betas"]
        state["step"] = torch.tensor(float(done + 1))
        state["exp_avg"].lerp_(gradient, 1 - beta1)
        state["exp_avg_sq"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        # One tensor at a time: the planner counts no more.
        size = state["exp_avg_sq"].sqrt().div_(math.sqrt(1 - beta2 ** (done + 1))).add_(group["eps"])
        update = torch.div(state["exp_avg"], size, out=size).div_(1 - beta1 ** (done + 1))
        if projected:
            update = project_back(update, state["projection"], parameter.shape).mul_(self._settings.scale)
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.sub_(update, alpha=group["lr"])


def projection(gradient: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal directions of the shorter side (shorter side × rank) in which a gradient is largest: its singular vectors, as eigenvectors of
    the smaller Gram matrix."""
    scaled = gradient.float() / gradient.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    gram = scaled.T @ scaled if is_tall(gradient.shape) else scaled @ scaled.T
    del scaled  # the decomposition needs the memory
    _, vectors = torch.linalg.eigh(gram)  # smallest first
    found: torch.Tensor = vectors[:, -rank:].to(gradient.dtype).contiguous()
    return found


def is_tall(shape: torch.Size) -> bool:
    """Whether the second side is the shorter."""
    return shape[0] >= shape[1]


def project(gradient: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """To rank columns, or rows."""
    return gradient @ directions if is_tall(gradient.shape) else directions.T @ gradient


def project_back(update: torch.Tensor, directions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """To the weight's shape."""
    return update @ directions.T if is_tall(shape) else directions @ update


def galore_groups(model: Any, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Trainer's groups, with those weights of linear layers apart that are projected: not embeddings, and not the head."""
    head = model.get_output_embeddings()
    linear = {id(m.weight) for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head}
    parts = []
    for group in groups:
        for projected in (False, True):
            if parameters := [p for p in group["params"] if (id(p) in linear) is projected]:
                parts.append({**group, "params": parameters, "projected": projected})
    return parts
