"""The combined adapter's files, written module by module: of all adapters, one module's matrices are in memory at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from finetune_api.failures import Reason
from finetune_api.results import FileRecord
from finetune_api.spec import AdapterCombinationSpec
from finetune_trainer import heartbeat
from finetune_trainer.combine.methods import Part, combine, highest_rank
from finetune_trainer.combine.sources import Source
from finetune_trainer.errors import StageError
from finetune_trainer.lora_files import CONFIG, LORA_A, LORA_B, PREFIX, WEIGHTS
from finetune_trainer.publish.safetensors_stream import StreamWriter, TensorInfo

TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
"""peft's settings that say which layers an adapter has."""


def result_rank(spec: AdapterCombinationSpec, sources: list[Source]) -> int:
    """Of the combined adapter."""
    ranks: dict[str, list[int]] = {}
    for source in sources:
        for module, (_, rank, _) in source.shapes.items():
            ranks.setdefault(module, []).append(rank)
    return highest_rank(spec, ranks)


def modules_of(sources: list[Source]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of all modules that any of them has, in the order of their names."""
    shapes = {m: (outputs, inputs) for s in sources for m, (outputs, _, inputs) in s.shapes.items()}
    return dict(sorted(shapes.items()))


def parts_of(sources: list[Source], module: str) -> list[Part]:
    """What the adapters that have a module make of it."""
    return [Part(s.adapter.lora(module), s.asked.weight) for s in sources if module in s.shapes]


def write_weights(
    spec: AdapterCombinationSpec, sources: list[Source], rank: int, folder: Path
) -> tuple[FileRecord, dict[str, float]]:
    """adapter_model.safetensors; and by module what the rank could not hold, where the type means the weighted sum.

    Raises:
        StageError: InvalidConfig for adapters with values that are not finite.
    """
    shapes = modules_of(sources)
    left_out: dict[str, float] = {}
    with StreamWriter(folder / WEIGHTS, list(_announced(shapes, rank))) as writer:
        for module in shapes:
            parts = parts_of(sources, module)
            _must_be_finite(sources, module, parts)
            made = combine(spec, module, parts, rank)
            if made.left_out is not None:
                left_out[module] = made.left_out
            writer.write(made.a)
            writer.write(made.b)
            heartbeat.beat()
        return writer.record(WEIGHTS), left_out


def _announced(shapes: dict[str, tuple[int, int]], rank: int) -> Iterator[TensorInfo]:
    for module, (outputs, inputs) in shapes.items():
        yield TensorInfo(f"{PREFIX}{module}{LORA_A}", WEIGHTS, "F32", (rank, inputs))
        yield TensorInfo(f"{PREFIX}{module}{LORA_B}", WEIGHTS, "F32", (outputs, rank))


def _must_be_finite(sources: list[Source], module: str, parts: list[Part]) -> None:
    having = [s for s in sources if module in s.shapes]
    for source, part in zip(having, parts, strict=True):
        if not all(torch.isfinite(half).all() for half in (part.lora.a, part.lora.b)):
            raise StageError(
                Reason.INVALID_CONFIG, f"{source.asked.uri} has values in {module} that are infinite or not numbers."
            )


def write_config(sources: list[Source], rank: int, folder: Path) -> None:
    """adapter_config.json, with a scaling of 1."""
    first = sources[0].config
    revisions = {s.config.get("revision") for s in sources}
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=first.get("lora_dropout", 0.0),
        base_model_name_or_path=sources[0].base,
        revision=revisions.pop() if len(revisions) == 1 else None,
        task_type=first.get("task_type"),
        inference_mode=True,
        **targets([s.config for s in sources], list(modules_of(sources))),
    )
    # Sets stand in the order of this process's string hashes.
    ordered = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    (folder / CONFIG).write_text(json.dumps(ordered, indent=2, sort_keys=True))


def targets(configs: list[Any], modules: list[str]) -> dict[str, Any]:
    """The settings by which peft finds these modules: those of the adapters where they agree, their names together where only these differ, and
    otherwise every module by its full name."""
    found = [{name: _plain(config.get(name)) for name in TARGETING} for config in configs]
    if all(f == found[0] for f in found):
        return found[0]
    rest = [{k: v for k, v in f.items() if k != "target_modules"} for f in found]
    if all(r == rest[0] for r in rest) and all(isinstance(f["target_modules"], list) for f in found):
        return {**rest[0], "target_modules": sorted({name for f in found for name in f["target_modules"]})}
    return {"target_modules": modules}


def _plain(value: Any) -> Any:
    """A setting in a form in which two that mean the same are equal."""
    return sorted(value) if isinstance(value, list) else value
