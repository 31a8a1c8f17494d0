"""Which layers an adapter is put on or leaves out, and what is set for single ones: peft's ``target_modules``, ``exclude_modules``,
``layers_to_transform`` and patterns; and what no adapter is put on."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase

_LAYER = re.compile(r"(?:.*?\.)?[^.]+\.(\d+)\.")
"""The first number in the name, as in peft (0.21, tuners_utils.check_target_module_exists); files may leave the model's own name out."""
_WILDCARDS = frozenset("*?[")


def is_pattern(name: str) -> bool:
    """Whether a name stands for several: ``*`` for any characters, ``?`` for one, ``[0-9]`` and ``[!0-9]`` for one in or out of a set.

    No regular expressions: those can take years to find out that they do not match.
    """
    return not _WILDCARDS.isdisjoint(name)


_MIXTURE = re.compile(r"\.experts\.|\.router\.|\.block_sparse_moe\.")
"""In the names of experts and routers; files and transformers do not always have the same."""
ROUTED = frozenset(
    ("gate", "router", "shared_expert_gate", "w1", "w2", "w3", "gate_proj", "up_proj", "down_proj", "gate_up_proj",
     "input_linear", "output_linear")
)  # fmt: skip
"""What the layers of experts, shared experts and routers are called."""


def routed_kinds(tensors: Iterable[str]) -> frozenset[str]:
    """Last parts of the names of layers that no adapter is put on in a mixture of experts; none in other models.

    transformers 5 keeps experts and routers as bare parameters. peft (0.21, _convert_peft_config_moe) takes these names for those parameters,
    also where a shared expert or a dense layer has them, adapts parameters without dropout only, and makes a copy of all experts' weights in each
    pass. vLLM serves no adapter on a gate.

    Args:
        tensors: names of all tensors, as in the files or as transformers has them.
    """
    inside = {n.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2] for n in tensors if _MIXTURE.search(n)}
    return ROUTED | inside if inside else frozenset()


def is_named(module: str, names: Collection[str]) -> bool:
    """Whether a module has one of these names, or ends with a dot and one of them; names may be patterns."""
    return any(
        fnmatchcase(f".{module}", f"*.{name}") if is_pattern(name) else module == name or module.endswith(f".{name}")
        for name in names
    )


def without_patterns(names: Collection[str], modules: Collection[str]) -> list[str]:
    """The same in peft's words: the full names of the modules that patterns fit in their place."""
    patterns = [name for name in names if is_pattern(name)]
    fitting = [module for module in modules if is_named(module, patterns)]
    return sorted({*(name for name in names if not is_pattern(name)), *fitting})


def kinds_and_layers(modules: Collection[str]) -> tuple[list[str], list[int] | None]:
    """Modules as target_modules and layers_to_transform: what they are called within their layers, and the indices of those; no indices
    where some are in no layer."""
    found = {module: _LAYER.match(module) for module in modules}
    kinds = {module[match.end() :] if match else module for module, match in found.items()}
    layers = {int(match[1]) for match in found.values() if match}
    return sorted(kinds), sorted(layers) if all(found.values()) else None


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
