"""Parameter counts from shapes alone, by PEFT's rules for which layers get an adapter."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api.failures import Reason
from finetune_api.planner.base_model import why_not_tunable
from finetune_api.planner.tensors import BUFFER, fused_experts, parameter_name
from finetune_api.snapshot import ResolvedLora
from finetune_api.spec import LoraBias
from finetune_api.targets import is_left_out, is_named, is_pattern, routed_kinds, setting_of
from finetune_trainer.errors import StageError
from finetune_trainer.lora_files import CONV1D
from finetune_trainer.sources.model import TensorHeaders

ALL_LINEAR = "all-linear"
EMBEDDING = re.compile(r"(^|\.)(wte|wpe|[a-z_]*embed[a-z_]*)$")
INPUTS = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in)$")
HEAD = re.compile(r"(^|\.)(lm_head|embed_out|output|score)$")
BLOCK = re.compile(r"\.\d+\.")
EXPERT = re.compile(r"\.experts\.\d+\.")
MAMBA = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe")
USUAL_EMBEDDINGS = "model.embed_tokens.weight"
KNOWN_EMBEDDINGS = {
    "gpt2": ("wte.weight", "transformer.wte.weight"),
    "gpt_neox": ("gpt_neox.embed_in.weight",),
    "falcon": ("transformer.word_embeddings.weight",),
    **dict.fromkeys(MIXTURES, (USUAL_EMBEDDINGS,)),
}
"""What the embeddings are called in the files of models that have other names there than Llama's, or experts, and are merged as transformers
loads them."""


@dataclass(frozen=True)
class Parameters:
    """Counts of parameters; ``targets`` are the full names of the adapted layers."""

    trainable: int
    total: int
    targets: list[str]
    experts: list[str] = field(default_factory=list)
    """Full names of the fused experts that are adapted besides."""


def check_config(folder: Path, uri: str) -> dict[str, Any]:
    """``config.json``, of a kind that can be fine-tuned.

    Raises:
        StageError: UnsupportedModel.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        refused = why_not_tunable(config, uri)
    except FileNotFoundError:
        raise StageError(
            Reason.UNSUPPORTED_MODEL, f"{uri} has no config.json: it is not a Hugging Face model folder"
        ) from None
    except (ValueError, AttributeError) as error:
        raise StageError(Reason.UNSUPPORTED_MODEL, f"{uri}: config.json is not a JSON object ({error})") from error
    if refused:
        raise StageError(Reason.UNSUPPORTED_MODEL, refused)
    return dict(config)


def count_parameters(headers: TensorHeaders, lora: ResolvedLora, token_rows: int = 0) -> Parameters:
    """Trainable parameters of LoRA, rank × (in + out) per adapted layer (Hu et al., 2021), with DoRA its outputs, and the chosen biases; and
    all parameters.

    Args:
        token_rows: numbers in trained tokens' rows of the embeddings.

    Raises:
        StageError: UnknownTargetModule, InvalidConfig for output head or embeddings.
    """
    tensors = {parameter_name(name): shape for name, (_, shape) in headers.items() if not BUFFER.search(name)}
    matrices = {
        name.removesuffix(".weight"): shape
        for name, shape in tensors.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    routed = routed_kinds(tensors)
    linear = {n: shape for n, shape in matrices.items() if _is_linear(n) and n.rpartition(".")[2] not in routed}
    targets = _remaining(_match(lora.target_modules, linear, matrices), lora)
    _patterns_name(targets, lora)
    trainable = sum(
        setting_of(name, lora.rank_pattern, lora.rank) * sum(linear[name])
        + lora.use_dora * _outputs(name, linear[name])
        for name in targets
    )
    _no_routed_is_saved(routed, lora)
    trainable += _biases(tensors, targets, lora.bias) + _saved(tensors, targets, lora.modules_to_save)
    experts = _experts(headers, lora)
    trainable += sum(lora.rank * number * (outputs + inputs) for number, outputs, inputs in experts.values())
    total = sum(math.prod(shape) for shape in tensors.values())
    return Parameters(trainable + token_rows, total, targets, sorted(experts))


def _experts(headers: TensorHeaders, lora: ResolvedLora) -> dict[str, tuple[int, ...]]:
    """Fused experts that get an update for each, by the model's name for the parameter: (experts, outputs, inputs)."""
    if not lora.target_parameters:
        return {}
    fused = fused_experts({name: shape for name, (_, shape) in headers.items()})
    for name in lora.target_parameters:
        if not any(is_named(parameter, [name]) for parameter in fused):
            choices = ", ".join(sorted({".".join(parameter.split(".")[-3:]) for parameter in fused}))
            has = (
                f"whose fused experts are {choices}"
                if fused
                else "which has no fused experts: name its layers in targetModules"
            )
            raise StageError(
                Reason.UNKNOWN_TARGET_MODULE,
                f"method.lora.targetParameters: {name} is no parameter of this model's experts, {has}",
            )
    return {name: shape for name, shape in fused.items() if is_named(name, lora.target_parameters)}


def _outputs(name: str, shape: tuple[int, ...]) -> int:
    """Of a linear layer; GPT-2's are Conv1D, stored the other way round."""
    return shape[1] if CONV1D.search(name) else shape[0]


def is_mixture_of_experts(headers: TensorHeaders) -> bool:
    """Whether experts exist."""
    return bool(routed_kinds(headers))


def refuse_mamba_projections(model_type: object, parameters: Parameters) -> None:
    """peft (0.21, _check_lora_target_modules_mamba) puts no adapter on them: their weights go into a kernel of its own.

    Raises:
        StageError: InvalidConfig.
    """
    if model_type in MAMBA and any(name.endswith(".out_proj") for name in parameters.targets):
        raise StageError(
            Reason.INVALID_CONFIG,
            f"method.lora.targetModules: no adapter can be put on out_proj of a {model_type}. Set method.lora.excludeModules: [out_proj].",
        )


def _is_linear(name: str) -> bool:
    """all-linear means every linear layer but the output head. Expert layers are fused into one parameter at loading."""
    if EMBEDDING.search(name) or EXPERT.search(name):
        return False
    # ``output`` is a head only outside the repeated blocks (BERT-like blocks have layers of that name).
    return not (HEAD.search(name) and not BLOCK.search(name))


def _match(wanted: list[str], linear: Mapping[str, Any], matrices: Mapping[str, Any]) -> list[str]:
    if wanted == [ALL_LINEAR]:
        if not linear:
            raise StageError(
                Reason.UNSUPPORTED_MODEL, "the model has no linear layers that an adapter could be added to"
            )
        return sorted(linear)
    targets: set[str] = set()
    for module in wanted:
        found = [name for name in linear if is_named(name, [module])]
        if not found:
            raise _unknown(module, linear, matrices)
        targets |= set(found)
    return sorted(targets)


def _remaining(named: list[str], lora: ResolvedLora) -> list[str]:
    """Those that are not left out. A setting that leaves nothing out is a slip of the pen: peft would only warn, or adapt fewer layers."""
    for module in lora.exclude_modules:
        if not any(is_named(name, [module]) for name in named):
            kinds = ", ".join(sorted({name.rpartition(".")[2] for name in named}))
            raise StageError(
                Reason.UNKNOWN_TARGET_MODULE,
                f"method.lora.excludeModules: {module} is none of the layers that would be adapted, which are {kinds}",
            )
    for layer in lora.layers_to_transform or []:
        if all(is_left_out(name, [], [layer]) for name in named):
            raise StageError(
                Reason.INVALID_CONFIG,
                f"method.lora.layersToTransform: no layer {layer} would be adapted; the last is such as {named[-1]}",
            )
    targets = [name for name in named if not is_left_out(name, lora.exclude_modules, lora.layers_to_transform)]
    if not targets:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"method.lora.excludeModules and layersToTransform leave none of {len(named)} layers to adapt",
        )
    return targets


def _patterns_name(targets: list[str], lora: ResolvedLora) -> None:
    """peft takes a rank or an alpha of what is not there for none at all, without a word."""
    for setting, pattern in (("rankPattern", lora.rank_pattern), ("alphaPattern", lora.alpha_pattern)):
        for module in pattern:
            if not any(is_named(name, [module]) for name in targets):
                kinds = ", ".join(sorted({name.rpartition(".")[2] for name in targets}))
                raise StageError(
                    Reason.UNKNOWN_TARGET_MODULE,
                    f"method.lora.{setting}: {module} is none of the layers that are adapted, which are {kinds}",
                )


def _unknown(module: str, linear: Mapping[str, Any], matrices: Mapping[str, Any]) -> StageError:
    choices = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
    if any(is_named(name, [module]) for name in matrices):
        return StageError(
            Reason.INVALID_CONFIG,
            f"method.lora.targetModules: {module} is the output head, an embedding, or of a mixture of experts (their layers, also of shared ones, and "
            "routers), which cannot be adapted; "
            f"use some of {choices}, or {ALL_LINEAR}",
        )
    if is_pattern(module):
        return StageError(
            Reason.UNKNOWN_TARGET_MODULE,
            f"method.lora.targetModules: {module} fits none of this model's linear layers, which are {choices}, such as {next(iter(linear))}",
        )
    return StageError(
        Reason.UNKNOWN_TARGET_MODULE,
        f"method.lora.targetModules: {module} does not exist in this model, which has {choices}",
    )


def _no_routed_is_saved(routed: frozenset[str], lora: ResolvedLora) -> None:
    """The files have other names for experts and routers than the model."""
    for module in lora.modules_to_save:
        if module.rpartition(".")[2] in routed:
            raise StageError(
                Reason.INVALID_CONFIG,
                f"method.lora.modulesToSave: {module} is of this model's mixture of experts, which stays as it is. Leave it out.",
            )


def _biases(tensors: Mapping[str, tuple[int, ...]], targets: list[str], bias: LoraBias) -> int:
    """peft's ``bias``: none, all, or those of the adapted layers."""
    if bias is LoraBias.NONE:
        return 0
    if bias is LoraBias.ALL:
        return sum(math.prod(shape) for name, shape in tensors.items() if name.endswith(".bias"))
    return sum(math.prod(tensors[f"{name}.bias"]) for name in targets if f"{name}.bias" in tensors)


def _saved(tensors: Mapping[str, tuple[int, ...]], targets: list[str], modules: list[str]) -> int:
    """Modules that are trained whole: they exist, and are not adapted besides."""
    owners = {name: name.rpartition(".")[0] for name in tensors}
    for module in modules:
        if not any(is_named(owner, [module]) for owner in owners.values()):
            kinds = ", ".join(sorted({owner.rpartition(".")[2] for owner in owners.values()}))
            raise StageError(
                Reason.UNKNOWN_TARGET_MODULE,
                f"method.lora.modulesToSave: {module} is no module with weights of this model, which has {kinds}",
            )
        if any(is_named(name, [module]) for name in targets):
            raise StageError(
                Reason.INVALID_CONFIG,
                f"method.lora.modulesToSave: {module} gets an adapter, too; name it in excludeModules, or leave it out here",
            )
    return sum(math.prod(shape) for name, shape in tensors.items() if is_named(owners[name], modules))


def refuse_unsaveable(headers: TensorHeaders, lora: ResolvedLora, tied: bool, quantized: bool) -> None:
    """What cannot be trained whole.

    Args:
        tied: input embeddings and output head are one.
        quantized: linear layers are, or may be.

    Raises:
        StageError: InvalidConfig.
    """
    if tied and any(HEAD.search(module) for module in lora.modules_to_save):
        raise StageError(
            Reason.INVALID_CONFIG,
            "method.lora.modulesToSave names the output head, which this model shares with its input embeddings (tie_word_embeddings): name "
            "embed_tokens, and both are trained as one.",
        )
    for module in lora.modules_to_save:
        # peft (0.21, _check_tied_modules) knows embeddings by that name alone, and has a warning for others.
        if tied and INPUTS.search(module) and module.rpartition(".")[2] != "embed_tokens":
            raise StageError(
                Reason.INVALID_CONFIG,
                f"method.lora.modulesToSave: {module} is the output head of this model too (tie_word_embeddings), and peft would train it as the "
                "input embeddings only: the two would no longer be one. Leave it out.",
            )
    matrices = [
        n.removesuffix(".weight") for n, (_, shape) in headers.items() if n.endswith(".weight") and len(shape) == 2
    ]
    packed = [n for n in matrices if _is_linear(n) and is_named(n, lora.modules_to_save)]
    if quantized and packed:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"method.lora.modulesToSave: QLoRA holds {packed[0]} quantized, which cannot be trained; use type: LoRA, or an adapter on it",
        )


def check_mergeable(headers: TensorHeaders, model_type: object, uri: str) -> None:
    """Refuse now what publish could not merge after the GPU time is spent.

    Args:
        model_type: config.json's.

    Raises:
        StageError: UnsupportedModel.
    """
    known = KNOWN_EMBEDDINGS.get(str(model_type), ())
    found = "" if any(name in headers for name in known) else why_not_writable(headers)
    if found:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"{uri} cannot be merged: expected a dense decoder with tensors named model.layers.…, or one of {', '.join(KNOWN_EMBEDDINGS)}; "
            f"found {found}. Set output.merged.enabled: false to train the adapter alone.",
        )


def why_not_writable(headers: TensorHeaders) -> str:
    """What keeps publish from writing the model's own weights, trained; empty if nothing does."""
    usual = USUAL_EMBEDDINGS in headers and any(name.startswith("model.layers.0.") for name in headers)
    if usual and not is_mixture_of_experts(headers):
        return ""
    return "a mixture of experts" if usual else f"tensors named otherwise (such as {min(headers)})"


def refuse_other_experts(lora: ResolvedLora, model_type: object, uri: str) -> None:
    """Adapters on the experts of models whose files have them otherwise: how peft would nest their parameters, and which way round they lie, is
    known of these alone.

    Raises:
        StageError: UnsupportedModel.
    """
    if lora.target_parameters and model_type not in MIXTURES:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"method.lora.targetParameters: {uri} is a {model_type}; experts of {', '.join(MIXTURES)} can be adapted. Leave it out to adapt the "
            "attention's layers alone.",
        )
