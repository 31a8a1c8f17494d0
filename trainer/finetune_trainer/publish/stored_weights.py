"""Which tensors of the files a model's weights are read from, by transformers' own rules of loading.

Files may have other names than the model (GPT-2's have no ``transformer.``, Mixtral's say ``block_sparse_moe``), and a tensor for each expert
where transformers 5 has one parameter for all of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.pytorch_utils import Conv1D

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.publish.safetensors_stream import module_of

Read = Callable[[str], torch.Tensor]
"""The values of a tensor by its name in the files."""


def empty_model(config_folder: Path, dtype: torch.dtype, trust_remote_code: bool = False) -> Any:
    """A causal language model without weights: parameters on the meta device, and buffers, which are computed and not loaded, real."""
    config = AutoConfig.from_pretrained(config_folder, trust_remote_code=trust_remote_code, local_files_only=True)
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)


@dataclass
class Source:
    """What a parameter is made of."""

    tensors: list[tuple[str, str | None]] = field(default_factory=list)
    """Names in the files, each with the pattern of the conversion that it fits."""
    converter: WeightConverter | None = None
    """Of several tensors, or of one that is turned; None for one that is taken as it is stored."""


@dataclass(frozen=True)
class Part:
    """Where a tensor of the files stands in a parameter of all experts: (experts, outputs, inputs)."""

    parameter: str
    expert: int
    experts: int
    half: int
    """Of the outputs, where they are put together of several tensors: gate, then up."""
    halves: int


class StoredWeights:
    """Where the parameters of a model stand in its files.

    Args:
        model: may be without weights.
        stored: names of all tensors in the files.

    Raises:
        StageError: UnsupportedModel, if they lack some.
    """

    def __init__(self, model: Any, stored: Collection[str]) -> None:
        self._model = model
        self._sources = sources_of(model, stored)
        self.alone = {n: source.tensors[0][0] for n, source in self._sources.items() if source.converter is None}
        """Parameters that stand in the files as they are, with their names there."""
        self.parts = {tensor: part for n, s in self._sources.items() for tensor, part in parts_of(n, s).items()}
        """Tensors of single experts, with their places in parameters of all."""
        head, embedding = (name_of(model, m) for m in (model.get_output_embeddings(), model.get_input_embeddings()))
        self.head = self.alone.get(f"{head}.weight")
        """The output head's tensor; None where it is the embeddings' and stored once."""
        self.conv1d = frozenset(
            module_of(self.alone[f"{n}.weight"])
            for n, module in model.named_modules()
            if isinstance(module, Conv1D) and f"{n}.weight" in self.alone
        )
        """Modules, by their names in the files, whose weights are stored (inputs, outputs)."""
        if model.config.get_text_config().tie_word_embeddings and f"{embedding}.weight" in self._sources:
            self._sources.setdefault(f"{head}.weight", self._sources[f"{embedding}.weight"])
        # Duplicates stay in, because before loading a tied head may already be the embedding's parameter.
        missing = [n for n, _ in model.named_parameters(remove_duplicate=False) if n not in self._sources]
        if missing:
            raise StageError(
                Reason.UNSUPPORTED_MODEL,
                f"{len(missing)} weights of {type(model).__name__} (such as {missing[0]}) are not in the model's files under that name.",
            )

    def read(self, parameter: str, read: Read) -> torch.Tensor:
        """The values of a parameter."""
        source = self._sources[parameter]
        if source.converter is None:
            return read(source.tensors[0][0])
        converter = deepcopy(source.converter)
        for name, pattern in source.tensors:
            converter.add_tensor(parameter, name, pattern, partial(read, name))
        made = converter.convert(parameter, model=self._model, config=self._model.config)[parameter]
        value: torch.Tensor = made[0] if isinstance(made, list) else made
        return value


def sources_of(model: Any, stored: Collection[str]) -> dict[str, Source]:
    """By parameter, what transformers would load it from (5.23, convert_and_load_state_dict_in_model)."""
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, Source] = {}
    for tensor in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(tensor, renamings, converters, prefix, state)
        if name not in state and tensor in state:
            name, pattern = tensor, None
        if name in state:
            source = found.setdefault(name, Source(converter=by_pattern[pattern] if pattern is not None else None))
            source.tensors.append((tensor, pattern))
    return found


def parts_of(parameter: str, source: Source) -> dict[str, Part]:
    """The tensors of single experts that are stacked, then put side by side."""
    if source.converter is None:
        return {}
    stacked = [type(operation) for operation in source.converter.operations] in (
        [MergeModulelist],
        [MergeModulelist, Concatenate],
    )
    found: dict[str, Part] = {}
    patterns = source.converter.source_patterns
    for half, wanted in enumerate(patterns if stacked else []):
        names = [name for name, pattern in source.tensors if pattern == wanted]
        found |= {n: Part(parameter, expert, len(names), half, len(patterns)) for expert, n in enumerate(names)}
    return found


def name_of(model: Any, module: Any) -> str | None:
    """A module's full name."""
    return next((name for name, found in model.named_modules() if found is module), None)
