"""Which matrices are linear layers, which of them get an adapter, and which are quantized."""

from __future__ import annotations

import math
import re

from finetune_api.base import ApiModel
from finetune_api.planner.architecture import Architecture, Family
from finetune_api.planner.tensors import EMBEDDING, HEAD, Shapes
from finetune_api.planner.workload import Tuning
from finetune_api.spec import LoraBias
from finetune_api.targets import is_left_out, is_named, routed_kinds

ALL_LINEAR = "all-linear"
ROUTER = re.compile(r"\.mlp\.(gate|router)\.weight$")
LAYER_INDEX = re.compile(r"\.(\d+)\.")


class UnknownTarget(ValueError):
    """A name in targetModules that matches no linear layer."""


class Linear(ApiModel):
    """A linear layer; ``inputs`` and ``outputs`` are its features."""

    name: str
    inputs: int
    outputs: int
    adaptable: bool = True
    """It may get an adapter; shared experts and what belongs to them may not."""

    @property
    def kind(self) -> str:
        """The last part of the name, as targetModules has it."""
        return self.name.rpartition(".")[2]

    @property
    def layer(self) -> int:
        """Index of its decoder layer."""
        found = LAYER_INDEX.search(self.name)
        return int(found[1]) if found else 0


def linear_layers(shapes: Shapes, arch: Architecture) -> list[Linear]:
    """Every linear layer but the output head, in the model's order. Routers and fused experts are none: transformers 5 keeps
    them as bare parameters."""
    found, routed = [], routed_kinds(shapes)
    for name, shape in shapes.items():
        if len(shape) != 2 or not name.endswith(".weight") or any(p.search(name) for p in (EMBEDDING, HEAD, ROUTER)):
            continue
        rows, columns = shape
        inputs, outputs = (rows, columns) if arch.family is Family.GPT2 else (columns, rows)
        module = name.removesuffix(".weight")
        adaptable = module.rpartition(".")[2] not in routed
        found.append(Linear(name=module, inputs=inputs, outputs=outputs, adaptable=adaptable))
    return found


def adapted_layers(linears: list[Linear], tuning: Tuning) -> list[Linear]:
    """PEFT's rule: ``all-linear``, or layers whose name is, or ends with a dot and, one of the given; without those left out.

    Raises:
        UnknownTarget: a name that matches nothing, or nothing is left.
    """
    named = linears = [layer for layer in linears if layer.adaptable]
    if tuning.target_modules != [ALL_LINEAR]:
        for module in tuning.target_modules:
            if not any(is_named(layer.name, [module]) for layer in linears):
                choices = ", ".join(sorted({layer.kind for layer in linears}))
                raise UnknownTarget(f"{module} is none of this model's linear layers, which are {choices}")
        named = [layer for layer in linears if is_named(layer.name, tuning.target_modules)]
    adapted = [
        layer for layer in named if not is_left_out(layer.name, tuning.exclude_modules, tuning.layers_to_transform)
    ]
    if not adapted:
        raise UnknownTarget("excludeModules and layersToTransform leave no layer to adapt")
    for module in tuning.rank_pattern:
        if not any(is_named(layer.name, [module]) for layer in adapted):
            raise UnknownTarget(f"rankPattern names {module}, which is none of the adapted layers")
    return adapted


def quantized_layers(linears: list[Linear], arch: Architecture) -> list[Linear]:
    """What transformers 5.23 replaces by bitsandbytes' Linear4bit (integrations/bitsandbytes.py): layers of exactly the type
    nn.Linear, and Conv1D. Falcon's are of a class of their own, so QLoRA leaves Falcon in 16 bit; experts are bare parameters."""
    return [] if arch.family is Family.FALCON else linears


def trainable_parameters(shapes: Shapes, arch: Architecture, tuning: Tuning) -> int:
    """rank × (inputs + outputs) for each adapted layer (Hu et al., 2021), with DoRA its outputs once more, the biases PEFT's ``bias`` names, modules
    that are trained whole, and the rows of trained tokens; for fused experts as much for each of them."""
    targets = adapted_layers(linear_layers(shapes, arch), tuning)
    count = matrix_parameters(targets, tuning) + tuning.dora * sum(layer.outputs for layer in targets)
    count += sum(tuning.rank * experts * (o + i) for experts, o, i in adapted_experts(shapes, tuning).values())
    count += tuning.token_rows * arch.hidden_size * (1 if arch.tied_embeddings else 2)
    return count + _biases(shapes, targets, tuning.bias) + _saved(shapes, tuning.modules_to_save)


def adapted_experts(shapes: Shapes, tuning: Tuning) -> dict[str, tuple[int, int, int]]:
    """Fused experts that get an update for each, by name: (experts, outputs, inputs).

    Raises:
        UnknownTarget: a name that matches nothing.
    """
    fused = {n: (s[0], s[1], s[2]) for n, s in shapes.items() if ".experts." in n and len(s) == 3}
    for name in tuning.target_parameters:
        if not any(is_named(parameter, [name]) for parameter in fused):
            raise UnknownTarget(f"targetParameters names {name}, which is none of this model's fused experts")
    return {name: shape for name, shape in fused.items() if is_named(name, tuning.target_parameters)}


def matrix_parameters(targets: list[Linear], tuning: Tuning) -> int:
    """rank × (inputs + outputs) for each adapted layer: what A and B have."""
    return sum(tuning.rank_of(layer.name) * (layer.inputs + layer.outputs) for layer in targets)


def _saved(shapes: Shapes, modules: list[str]) -> int:
    """Modules that are trained whole.

    Raises:
        UnknownTarget: a name that matches nothing.
    """
    found = {name: math.prod(shape) for name, shape in shapes.items() if is_named(name.rpartition(".")[0], modules)}
    for module in modules:
        if not any(is_named(name.rpartition(".")[0], [module]) for name in found):
            raise UnknownTarget(f"modulesToSave names {module}, which is no module with weights")
    return sum(found.values())


def _biases(shapes: Shapes, targets: list[Linear], bias: LoraBias) -> int:
    if bias is LoraBias.NONE:
        return 0
    if bias is LoraBias.ALL:
        return sum(math.prod(shape) for name, shape in shapes.items() if name.endswith(".bias"))
    return sum(math.prod(shapes[f"{t.name}.bias"]) for t in targets if f"{t.name}.bias" in shapes)
