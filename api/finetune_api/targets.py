"""Which layers an adapter leaves out: peft's ``exclude_modules`` and ``layers_to_transform``."""

from __future__ import annotations

import re
from collections.abc import Collection

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
