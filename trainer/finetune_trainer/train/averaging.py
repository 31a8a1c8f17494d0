"""Schedule-free optimizers (Defazio et al., 2024) take gradients at one point, and what they learned is another: the average of all steps.

The way there and back is not exact (schedulefree 1.4.1 interpolates in place), so the weights that training goes on with never make it. A
checkpoint has those; where weights are evaluated or published their average is made of them and of the optimizer's state.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

NAMES = "param_names"
"""torch's own key of a group of parameters: it tells whose a state is that comes from a file."""


def name_parameters(optimizer: torch.optim.Optimizer, model: torch.nn.Module) -> None:
    """Have an optimizer's state say whose it is."""
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group[NAMES] = [names[id(p)] for p in group["params"]]


@torch.no_grad()
def to_average(model: torch.nn.Module, state: dict[str, Any]) -> None:
    """Trained weights become their average: x = y + (1 - 1/β)(z - y), as schedulefree's ``eval`` has it.

    Args:
        model: as training goes on with it (y).
        state: the optimizer's ``state_dict`` after the same step, on any device; it has z of each parameter that has had a gradient.
    """
    parameters = dict(model.named_parameters())
    for group in state["param_groups"]:
        momentum = group["betas"][0] if "betas" in group else group["momentum"]
        for index, name in zip(group["params"], group[NAMES], strict=True):
            if "z" in (kept := state["state"].get(index, {})):
                parameter = parameters[name]
                parameter.lerp_(kept["z"].to(parameter.device), 1 - 1 / momentum)


@contextmanager
def averaged(model: torch.nn.Module, state: dict[str, Any]) -> Iterator[None]:
    """Trained weights are their average in the meantime, and then bit for bit what they were. The copy takes the place of the gradients, of which
    there are none between two steps."""
    before = {p: p.detach().clone() for p in model.parameters() if p.requires_grad}
    to_average(model, state)
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before.items():
                parameter.copy_(value)
