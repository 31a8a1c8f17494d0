"""Which layers an adapter leaves out, and what is set for single ones: peft's ``exclude_modules``, ``layers_to_transform`` and patterns."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_LAYER = re.compile(r"(?:.*?\.)?[^.]+\.(\d+)\.")
"""The first number in the name, as in peft (0.21, tuners_utils.check_target_module_exists); files may leave the model's own name out."""


def is_named(module: str, names: Collection[str]) -> bool:
    """Whether a module has one of these names, or ends with a dot and one of them."""
    return any(module == name or module.endswith(f".{name}") for name in names)


def is_left_out(module: str, exclude_modules: Collection[str], layers_to_transform: Collection[int] | None) -> bool:
    """Whether a module that would be adapted is not.

    Args:
        layers_to_transform: indices of the layers that are adapted; None: all.
    """
    if is_named(module, exclude_modules):
        return True
    if layers_to_transform is None:
        return False
    found = _LAYER.match(module)
    return found is None or int(found[1]) not in layers_to_transform


def setting_of(module: str, pattern: Mapping[str, int], default: int) -> int:
    """What the most specific name that is the module's says: ``layers.0.mlp.up_proj`` says more than ``up_proj``. Maps have no order, neither
    in YAML nor in the snapshot."""
    names = [name for name in pattern if is_named(module, [name])]
    return pattern[max(names, key=lambda name: (name.count("."), len(name)))] if names else default


def as_peft_reads(modules: Collection[str], pattern: Mapping[str, int]) -> dict[str, int]:
    """A pattern of an adapter's file by the full names of modules. peft takes the first name that fits, in the order of the file."""
    found = {m: next((v for name, v in pattern.items() if is_named(m, [name])), None) for m in modules}
    return {module: value for module, value in found.items() if value is not None}
