"""The adapters: fetched, and refused where they cannot be combined."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from finetune_api import names
from finetune_api.failures import Reason
from finetune_api.results import FileRecord
from finetune_api.spec import WeightedAdapter
from finetune_trainer.context import CombineContext
from finetune_trainer.errors import StageError
from finetune_trainer.hashing import hash_files
from finetune_trainer.lora_files import (
    CONFIG,
    LORA_A,
    LORA_B,
    UNCHANGED_BASE,
    WEIGHTS,
    adapted_modules,
    strange_settings,
)
from finetune_trainer.prepare.tokenizer_files import PATTERNS
from finetune_trainer.publish.adapter import Adapter, read_adapter
from finetune_trainer.sources.model import resolve_source

Shapes = dict[str, tuple[int, int, int]]


@dataclass(frozen=True)
class Source:
    """One of the adapters, on this machine."""

    asked: WeightedAdapter
    commit: str | None
    adapter: Adapter
    config: Mapping[str, Any]
    shapes: Shapes
    """(outputs, rank, inputs) by module."""
    files: tuple[FileRecord, ...]
    """Its configuration and weights."""
    tokenizer: tuple[FileRecord, ...]

    @property
    def base(self) -> str:
        """Name of its base model."""
        return str(self.config["base_model_name_or_path"])

    @property
    def rank(self) -> int:
        """The highest of its modules."""
        return max(rank for _, rank, _ in self.shapes.values())


def fetch_adapter(ctx: CombineContext, index: int) -> Source:
    """One adapter and the tokenizer beside it.

    Raises:
        StageError: InvalidConfig for one that cannot be combined; what its source raises.
    """
    asked = ctx.snapshot.spec.adapters[index]
    source = resolve_source(ctx, names.adapter_slot(index), asked, asked.revision)
    tokenizer = [n for n in source.file_names() if any(fnmatch.fnmatchcase(n, p) for p in PATTERNS)]
    folder = source.fetch_files([CONFIG, WEIGHTS, *tokenizer], ctx.work_dir / f"adapter-{index}")
    place = f"adapters[{index}]: {asked.uri}"
    config = _read_config(folder, place)
    adapter, shapes = _read_weights(folder, place)
    records = hash_files(folder, [CONFIG, WEIGHTS]), hash_files(folder, tokenizer)
    return Source(asked, source.commit, adapter, config, shapes, tuple(records[0]), tuple(records[1]))


def _read_config(folder: Path, place: str) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind, base = config.get("peft_type"), config.get("base_model_name_or_path")
        with safe_open(folder / WEIGHTS, "pt") as file:
            modules = adapted_modules(file.keys())
    except (ValueError, AttributeError) as error:
        raise StageError(Reason.INVALID_CONFIG, f"{place} is no adapter of peft's ({CONFIG}: {error}).") from error
    except SafetensorError as error:
        raise StageError(Reason.INVALID_CONFIG, f"{place} is no adapter of peft's ({WEIGHTS}: {error}).") from error
    assert isinstance(config, dict)
    strange = strange_settings(
        config, modules, "modules_to_save", "trainable_token_indices", "target_parameters", "use_dora"
    )
    if kind != "LORA" or strange or config.get("bias", "none") != "none":
        found = kind if kind != "LORA" else ", ".join(strange) or "trained biases"
        raise StageError(
            Reason.INVALID_CONFIG, f"{place} is more than a plain LoRA adapter ({found}), which cannot be combined."
        )
    if (begun := config.get("init_lora_weights", True)) not in UNCHANGED_BASE:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{place} was initialized by {begun}, which changed the base's weights: on the base as it is published it means something else. "
            "Convert it with peft (path_initial_model_for_weight_conversion).",
        )
    if not base:
        raise StageError(Reason.INVALID_CONFIG, f"{place}: base_model_name_or_path in {CONFIG} names no base model.")
    return config


def _read_weights(folder: Path, place: str) -> tuple[Adapter, Shapes]:
    try:
        adapter = read_adapter(folder)
        with safe_open(folder / WEIGHTS, "pt") as file:
            found = {name: tuple(file.get_slice(key).get_shape()) for name, key in adapter.keys.items()}
    except StageError as error:
        raise StageError(Reason.INVALID_CONFIG, f"{place}: {error.message}") from error
    except (SafetensorError, KeyError, TypeError) as error:
        raise StageError(Reason.INVALID_CONFIG, f"{place} is no adapter of peft's ({error}).") from error
    halves = {f"{module}{half}" for module in adapter.modules for half in (LORA_A, LORA_B)}
    if others := sorted(found.keys() - halves):
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{place} has tensors other than the matrices A and B of linear layers, which cannot be combined: {', '.join(others[:3])}.",
        )
    shapes: Shapes = {}
    for module in adapter.modules:
        a, b = found[f"{module}{LORA_A}"], found[f"{module}{LORA_B}"]
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"{place}: the matrices A {list(a)} and B {list(b)} of {module} are not those of a linear layer.",
            )
        shapes[module] = (b[0], a[0], a[1])
    return adapter, shapes


def must_go_together(sources: list[Source], same_ranks: bool) -> None:
    """All are of one base, as far as names and shapes tell.

    Args:
        same_ranks: A is combined with A and B with B, so their shapes must agree as a whole.

    Raises:
        StageError: InvalidConfig.
    """
    first = sources[0]
    seen: dict[str, tuple[int, tuple[int, int, int]]] = {}
    for index, source in enumerate(sources):
        if source.base != first.base:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"adapters[0] was trained on {first.base} and adapters[{index}] on {source.base}: only adapters of one base can be combined.",
            )
        for module, shape in source.shapes.items():
            other, known = seen.setdefault(module, (index, shape))
            if (known[0], known[2]) != (shape[0], shape[2]):
                raise StageError(
                    Reason.INVALID_CONFIG,
                    f"{module} has {known[2]} inputs and {known[0]} outputs in adapters[{other}], {shape[2]} and {shape[0]} in adapters[{index}]: they are not of "
                    "the same base.",
                )
            if same_ranks and known[1] != shape[1]:
                raise StageError(
                    Reason.INVALID_CONFIG,
                    f"{module} has rank {known[1]} in adapters[{other}] and {shape[1]} in adapters[{index}]: this type combines matrices of one rank. Use Cat or SVD.",
                )


def shared_tokenizer(sources: list[Source]) -> tuple[FileRecord, ...] | None:
    """The files of the tokenizer that all adapters come with (perhaps none); None where they differ."""
    first = sources[0].tokenizer
    return first if all(s.tokenizer == first for s in sources) else None
