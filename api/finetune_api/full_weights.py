"""Which tensors ``method.type: Full`` trains, by names and shapes: the planner's and the prepare stage's one rule."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from finetune_api.spec import Full
from finetune_api.targets import is_named

Shapes = Mapping[str, tuple[int, ...]]

_LAYER = re.compile(r"\.(\d+)\.")
Kind = tuple[str, tuple[int, ...]]
"""A kind of matrix: its name without the layer's index, and its shape."""


class UnknownModule(ValueError):
    """A name in method.full.modules that no tensor has."""


def ranked_matrices(shapes: Shapes) -> dict[Kind, list[str]]:
    """The matrices that Spectrum ranks, by kind: weights in the decoder layers with two dimensions, in the model's order."""
    kinds: dict[Kind, list[str]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and name.endswith(".weight") and _LAYER.search(name):
            kinds.setdefault((_LAYER.sub(".*.", name, count=1), shape), []).append(name)
    return kinds


def chosen_count(layers: int, fraction: float) -> int:
    """How many of a kind are trained: rounded down, as Spectrum's own code does, and at least one."""
    return max(1, math.floor(layers * fraction + 1e-9))


def most_signal(shapes: Shapes, fraction: float, ratios: Mapping[str, float]) -> list[str]:
    """Of each kind those with the highest ratio, of equals the first; in the model's order."""
    chosen: set[str] = set()
    for names in ranked_matrices(shapes).values():
        chosen.update(sorted(names, key=lambda name: -ratios[name])[: chosen_count(len(names), fraction)])
    return [name for name in shapes if name in chosen]


def named_tensors(shapes: Shapes, full: Full) -> list[str]:
    """The tensors that are trained without Spectrum: all, or those in the modules that are named.

    Raises:
        UnknownModule: a name that matches nothing.
    """
    if full.modules is None:
        return list(shapes)
    for module in full.modules:
        if not any(_is_in(name, [module]) for name in shapes):
            kinds = sorted({name.rpartition(".")[0].rpartition(".")[2] for name in shapes})
            raise UnknownModule(
                f"method.full.modules: {module} is no module with weights of this model, which has {', '.join(kinds)}"
            )
    return [name for name in shapes if _is_in(name, full.modules)]


def trained_count(shapes: Shapes, full: Full) -> int:
    """How many weights are trained.

    Raises:
        UnknownModule: a name that matches nothing.
    """
    return sum(math.prod(shapes[name]) for name in stand_ins(shapes, full))


def stand_ins(shapes: Shapes, full: Full) -> list[str]:
    """Tensors of the shapes of those that are trained: for Spectrum the first of each kind, as its choice needs the weights.

    Raises:
        UnknownModule: a name that matches nothing.
    """
    if full.spectrum is None:
        return named_tensors(shapes, full)
    return most_signal(shapes, full.spectrum.fraction, dict.fromkeys(shapes, 0.0))


def _is_in(tensor: str, modules: list[str]) -> bool:
    """Whether one of the modules that a tensor lies in has one of these names."""
    parts = tensor.split(".")[:-1]
    return any(is_named(".".join(parts[:end]), modules) for end in range(1, len(parts) + 1))
