"""The adapter that training goes on from: fetched, checked against the base and the job, and kept beside the prepared data."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open

from finetune_api import names
from finetune_api.failures import Reason
from finetune_api.results import InitialAdapterRecord
from finetune_api.snapshot import resolve_plan
from finetune_api.spec import MOST_MODULES, FineTuneJobSpec, Lora
from finetune_api.targets import as_peft_reads, kinds_and_layers, setting_of
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.lora_files import (
    CONFIG,
    CONV1D,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    UNCHANGED_BASE,
    WEIGHTS,
    strange_settings,
    tensor_name,
)
from finetune_trainer.prepare.shapes import ALL_LINEAR, Parameters
from finetune_trainer.sources.model import resolve_source
from finetune_trainer.waiting import wait_until_available

Shapes = dict[str, tuple[int, ...]]
OF_THE_JOB = ("dropout", "loraplus_lr_ratio", "initialization")
"""What an adapter's file does not decide."""


@dataclass(frozen=True)
class InitialAdapter:
    """The adapter's files, here, and what stands in them."""

    folder: Path
    record: InitialAdapterRecord
    tensors: Shapes
    """By their names in the base's words."""


def fetch_initial_adapter(ctx: StageContext, stored: Collection[str]) -> InitialAdapter | None:
    """None where the job starts afresh.

    Args:
        stored: names of the tensors in the base's files.

    Raises:
        StageError: InvalidConfig for one that cannot be trained on; what its source raises.
    """
    asked = ctx.snapshot.spec.model.initial_adapter
    if asked is None:
        return None

    def fetch() -> tuple[Path, str | None]:
        source = resolve_source(ctx, names.INITIAL_ADAPTER_SLOT, asked, asked.revision)
        return source.fetch_files([CONFIG, WEIGHTS], ctx.work_dir / "initial-adapter"), source.commit

    folder, commit = wait_until_available(ctx, fetch)
    try:
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        with safe_open(folder / WEIGHTS, framework="np") as file:
            keys = file.keys()
            tensors: Shapes = {as_stored(tensor_name(k), stored): tuple(file.get_slice(k).get_shape()) for k in keys}
    except (ValueError, SafetensorError) as error:
        raise StageError(
            Reason.INVALID_CONFIG, f"model.initialAdapter: {asked.uri} is no adapter of peft's ({error})."
        ) from error
    modules = sorted(name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A))
    lora = settings_of(named_as_stored(config, stored), ctx.snapshot.spec.method.lora, asked.uri, modules)
    return InitialAdapter(folder, InitialAdapterRecord(uri=asked.uri, commit=commit, lora=lora), tensors)


def as_stored(name: str, stored: Collection[str]) -> str:
    """An adapter's tensor, or a module, in the words of the base's files, which may leave the model's own name out: GPT-2's ``h.0`` is ``transformer.h.0``."""
    module, mark, kind = name.partition(".lora_")
    tail = module.partition(".")[2]
    left_out = f"{module}.weight" not in stored and f"{tail}.weight" in stored
    return f"{tail if left_out else module}{mark}{kind}"


def named_as_stored(config: dict[str, Any], stored: Collection[str]) -> dict[str, Any]:
    """The same of the names in its settings, which may be full ones."""

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {as_stored(name, stored): number for name, number in value.items()}
        return [as_stored(name, stored) for name in value] if isinstance(value, list) else value

    naming = ("target_modules", "exclude_modules", "rank_pattern", "alpha_pattern")
    return {key: renamed(value) if key in naming else value for key, value in config.items()}


def settings_of(config: dict[str, Any], asked: Lora, uri: str, modules: list[str]) -> Lora:
    """An adapter's settings in the spec's words.

    Args:
        modules: those that it adapts.

    Raises:
        StageError: InvalidConfig, for an adapter that cannot be trained on, or a job that asks for another.
    """
    if (
        config.get("peft_type") != "LORA"
        or (
            strange := strange_settings(
                config, modules, "modules_to_save", "trainable_token_indices", "target_parameters"
            )
        )
        or config.get("bias") != "none"
    ):
        found = config.get("peft_type") if config.get("peft_type") != "LORA" else ", ".join(strange) or "trained biases"
        raise StageError(
            Reason.INVALID_CONFIG,
            f"model.initialAdapter: {uri} is more than a plain LoRA adapter ({found}), which cannot be trained on.",
        )
    if (begun := config.get("init_lora_weights", True)) not in UNCHANGED_BASE:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"model.initialAdapter: {uri} was initialized by {begun}, which changed the base's weights: on the base as it is published it means "
            "something else. Convert it with peft (path_initial_model_for_weight_conversion), or merge it.",
        )
    layers, targets, excluded = named_layers(config, modules)
    try:
        lora = Lora(
            rank=config["r"],
            alpha=config["lora_alpha"],
            target_modules=targets,
            exclude_modules=excluded,
            layers_to_transform=layers,
            rank_pattern=as_peft_reads(modules, config.get("rank_pattern") or {}) or None,
            alpha_pattern=as_peft_reads(modules, config.get("alpha_pattern") or {}) or None,
            use_rslora=config.get("use_rslora", False),
            use_dora=config.get("use_dora", False),
            **{name: getattr(asked, name) for name in OF_THE_JOB},
        )
    except (ValidationError, KeyError, TypeError) as error:
        raise StageError(
            Reason.INVALID_CONFIG, f"model.initialAdapter: {CONFIG} of {uri} cannot be used: {error}"
        ) from error
    default = Lora()
    for name in Lora.model_fields:
        mine, theirs = getattr(asked, name), getattr(lora, name)
        if mine != getattr(default, name) and comparable(mine, modules) != comparable(theirs, modules):
            raise StageError(
                Reason.INVALID_CONFIG,
                f"method.lora asks for {name}: {mine}, and the initial adapter has {theirs}. Leave it out: the adapter's own settings are used.",
            )
    return lora


def named_layers(config: Mapping[str, Any], modules: list[str]) -> tuple[list[int] | None, list[str], list[str] | None]:
    """Layers, targets and exclusions of an adapter's file. A regular expression of peft's, or more names than a job may have, become what
    the modules that are there are called within their layers; whether that names them all and no others is seen when tensors are compared."""
    layers, targets, excluded = (
        config.get(key) for key in ("layers_to_transform", "target_modules", "exclude_modules")
    )
    expressions = isinstance(excluded, str) or (isinstance(targets, str) and targets != ALL_LINEAR)
    if expressions or (not isinstance(targets, str) and len(targets or []) > MOST_MODULES):
        kinds, found = kinds_and_layers(modules)
        return found, kinds, None
    return (
        [layers] if isinstance(layers, int) else layers,
        [targets] if isinstance(targets, str) else sorted(targets or []),
        excluded or None,
    )


def comparable(value: Any, modules: list[str]) -> Any:
    """A setting in a form in which two that mean the same are equal: lists without their order, patterns by what they say of each module."""
    if isinstance(value, dict):
        return {module: setting_of(module, value, 0) for module in modules}
    return sorted(value) if isinstance(value, list) else value


def must_fit(adapter: InitialAdapter, spec: FineTuneJobSpec, base: Shapes, counted: Parameters) -> None:
    """Every layer that its settings name is there with the shapes that the base asks for, and nothing besides.

    Args:
        base: shape (outputs, inputs; of GPT-2's the other way round) of the base's tensors, by name.
        counted: what would be adapted by its settings.

    Raises:
        StageError: InvalidConfig.
    """
    lora = resolve_plan(spec).method.lora
    wanted: Shapes = {}
    for module in counted.targets:
        rank = setting_of(module, lora.rank_pattern, lora.rank)
        shape = base[f"{module}.weight"]
        outputs, inputs = shape[::-1] if CONV1D.search(module) else shape
        wanted[f"{module}{LORA_A}"], wanted[f"{module}{LORA_B}"] = (rank, inputs), (outputs, rank)
        if lora.use_dora:
            wanted[f"{module}{MAGNITUDE}"] = (outputs,)
    for name in sorted(wanted.keys() | adapter.tensors.keys()):
        has, needs = adapter.tensors.get(name), wanted.get(name)
        if has != needs:
            found = f"is {list(has)} in the adapter" if has else "is not in the adapter"
            expected = (
                f"{list(needs)} by its settings and the base" if needs else "not adapted by its settings and the base"
            )
            raise StageError(
                Reason.INVALID_CONFIG,
                f"model.initialAdapter: {adapter.record.uri} does not fit {spec.model.uri}: {name} {found}, and {expected}.",
            )
