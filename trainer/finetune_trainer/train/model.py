"""The base model and the adapter on it."""

from __future__ import annotations

import errno
import logging
from collections.abc import Collection, Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from finetune_api.failures import Reason
from finetune_api.snapshot import ResolvedLora, Snapshot
from finetune_api.spec import LoraBias, LoraInitialization, Quantization
from finetune_api.targets import is_left_out, is_named, routed_kinds, setting_of, without_patterns
from finetune_api.uris import HubLocation, parse_uri
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import add_new_tokens
from finetune_trainer.remote_code import remote_code
from finetune_trainer.train.device import Compute
from finetune_trainer.train.full import take_up_weights, trained_parameters
from finetune_trainer.train.offset_lora import make_offset
from finetune_trainer.train.tokens import ROWS, trained_rows

log = logging.getLogger(__name__)

BIAS = {LoraBias.NONE: "none", LoraBias.ALL: "all", LoraBias.LORA_ONLY: "lora_only"}
INITIALIZATION = {
    LoraInitialization.GAUSSIAN: "gaussian",
    LoraInitialization.ORTHOGONAL: "orthogonal",
    LoraInitialization.EVA: "eva",
}
"""peft's ``init_lora_weights``; the others begin as the default does and are computed afterwards."""
ALL_LINEAR = "all-linear"
SAVED = ".modules_to_save."
"""In the names of parameters: peft's copies of modules that are trained whole."""

disable_progress_bar()  # a pod's log is no terminal


def load_base(folder: Path, snapshot: Snapshot, compute: Compute) -> Any:
    """The base as a causal language model: in the computing type, or quantized for QLoRA.

    Raises:
        StageError: UnsupportedModel, if transformers cannot load the folder, or draws what its files lack.
    """
    quantization = snapshot.plan.method.quantization
    arguments: dict[str, Any] = {
        "dtype": compute.dtype,
        "trust_remote_code": snapshot.spec.model.trust_remote_code,
        "local_files_only": True,
        "use_safetensors": True,
        "device_map": {"": compute.device},
    }
    if quantization is not None:
        arguments["quantization_config"] = bits_and_bytes(quantization, compute.dtype)
    with blaming_the_model():
        model, loaded = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **arguments)
    must_be_read(model, loaded["missing_keys"])
    model.config.use_cache = False
    model.requires_grad_(False)
    keep_training_layout(model)
    if quantization is not None and quantization.bits == 8:
        from finetune_trainer.train.int8 import multiply_in_16_bit  # only here: others need no bitsandbytes

        multiply_in_16_bit(model, compute.dtype)
    return model


def must_be_read(model: Any, missing: Set[str]) -> None:
    """transformers (5.23) draws the weights that the files lack, with a warning only: they would be others in each execution.

    Args:
        missing: names that the files lack. Buffers among them are made anew.

    Raises:
        StageError: UnsupportedModel.
    """
    if drawn := sorted(missing & dict(model.named_parameters()).keys()):
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"the files of the base model have no {', '.join(drawn[:3])}{f' and {len(drawn) - 3} more weights' if len(drawn) > 3 else ''} of "
            f"{type(model).__name__}: expected all of them. Upload the model again, or name one that is whole.",
        )


@contextmanager
def blaming_the_model() -> Iterator[None]:
    """Errors of loading as UnsupportedModel, where they are the model's fault."""
    try:
        yield
    except (ValueError, KeyError, OSError, RuntimeError, ImportError, SafetensorError) as error:
        if not is_the_models_fault(error) or remote_code(error):
            raise
        raise StageError(Reason.UNSUPPORTED_MODEL, f"transformers cannot load the base model: {error}") from error


def is_the_models_fault(error: Exception) -> bool:
    """Whether loading would fail anywhere: then the job fails for good. A GPU's fault or a full disk passes, on another node at last.

    torch raises its own as RuntimeError, Python the disk's as OSError with a number. transformers raises an OSError without one
    for what a model folder lacks; a file that is named and missing has ENOENT.
    """
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
        return False
    return not (isinstance(error, OSError) and error.errno not in (None, errno.ENOENT))


def load_base_tokenizer(folder: Path, snapshot: Snapshot) -> Any:
    """The base model's tokenizer, with the job's new tokens, and its chat template where it has one: so it is saved with the adapter."""
    tokenizer = load_tokenizer(folder, snapshot)
    add_new_tokens(tokenizer, snapshot.spec.model.new_tokens or ())
    if snapshot.spec.data.chat_template is not None:
        tokenizer.chat_template = snapshot.spec.data.chat_template
    return tokenizer


def load_tokenizer(folder: Path, snapshot: Snapshot) -> Any:
    """The tokenizer of a model or adapter folder."""
    return AutoTokenizer.from_pretrained(
        folder, trust_remote_code=snapshot.spec.model.trust_remote_code, local_files_only=True
    )


def bits_and_bytes(quantization: Quantization, dtype: torch.dtype) -> BitsAndBytesConfig:
    """QLoRA's own: 4 bit, and products in ``dtype`` (bitsandbytes' default would be float32); or 8 bit."""
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type.value.lower(),
        bnb_4bit_use_double_quant=quantization.doubled,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_training_layout(model: Any) -> None:
    """Keep bitsandbytes from repacking weights for inference on a CPU.

    Observed with 0.50.2 on AVX-512-BF16: the first forward in evaluation mode repacks a ``Linear4bit`` in place, and the
    kernel for that layout has no backward. Evaluating before training would thus cut the gradient, without an error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def attach_adapter(
    base: Any, snapshot: Snapshot, initial: Path | None = None, token_ids: Sequence[int] = ()
) -> PeftModel:
    """A LoRA adapter on the base, trainables in float32: a fresh one, or with the weights of ``initial``.

    Args:
        token_ids: tokens whose rows of the embeddings are trained.

    Raises:
        StageError: UnknownTargetModule, InvalidConfig.
    """
    lora = snapshot.plan.method.lora
    refuse_tied_head(base, lora)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias=BIAS[lora.bias],
        target_modules=target_modules(base, lora),
        target_parameters=lora.target_parameters or None,
        exclude_modules=without_patterns(lora.exclude_modules, linear_layers(base)) or None,
        layers_to_transform=lora.layers_to_transform,
        rank_pattern=by_full_name(base, lora.rank_pattern),
        alpha_pattern=by_full_name(base, lora.alpha_pattern),
        modules_to_save=saved_modules(base, lora) or None,
        trainable_token_indices=trained_rows(base, token_ids),
        ensure_weight_tying=bool(lora.modules_to_save) and base.config.get_text_config().tie_word_embeddings,
        init_lora_weights=INITIALIZATION.get(lora.initialization, True),
        eva_config=EvaConfig(rho=1.0)
        if lora.initialization is LoraInitialization.EVA
        else None,  # ranks stay as planned
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(snapshot.spec.training.seed)
    linear = ", ".join(kinds(linear_layers(base)))  # before peft has put its own layers between them
    try:
        model = get_peft_model(base, config)
    except ValueError as error:
        raise StageError(Reason.UNKNOWN_TARGET_MODULE, f"{error} The linear layers are: {linear}.") from error
    make_trainables_float32(model)
    if lora.begins_at_weights:
        make_offset(model)
    if not lora.dropout and not lora.use_dora:
        take_inputs_as_they_are(model)
    if initial is not None:
        take_up(model, load_file(initial))
    config.base_model_name_or_path = public_name(snapshot)
    config.revision = None
    return model


def causal_lm(model: Any) -> Any:
    """The language model itself: what an adapter lies on, or the model whose own weights are trained."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def trained_state(model: Any) -> dict[str, torch.Tensor]:
    """What training changes, by the names in the adapter's file or in the model's own."""
    if isinstance(model, PeftModel):
        return dict(get_peft_model_state_dict(model, save_embedding_layers=False))
    return trained_parameters(model)


def take_up(model: Any, weights: dict[str, torch.Tensor]) -> None:
    """Give an adapter the weights of a file of peft's, or a model's own trained parameters those of such a file.

    Raises:
        AssertionError: tensors that the model has no place for, or the reverse.
    """
    if not isinstance(model, PeftModel):
        take_up_weights(model, weights)
        return
    missing = get_peft_model_state_dict(model, save_embedding_layers=False).keys() - weights.keys()
    assert not missing, f"the file lacks tensors of the adapter: {sorted(missing)[:3]}"
    found = set_peft_model_state_dict(model, weights)
    assert not found.unexpected_keys, f"the file has tensors that the model lacks: {found.unexpected_keys[:3]}"


def public_name(snapshot: Snapshot) -> str:
    """The base model's name as other tools know it: ``org/name`` for the Hub, the URI for anything else."""
    location = parse_uri(snapshot.spec.model.uri)
    return location.repo_id if isinstance(location, HubLocation) else snapshot.spec.model.uri


def refuse_tied_head(base: Any, lora: ResolvedLora) -> None:
    """An adapter on a head that is also the embedding would change both, and could not be merged into either."""
    if "lm_head" in lora.target_modules and base.config.get_text_config().tie_word_embeddings:
        raise StageError(
            Reason.INVALID_CONFIG,
            "method.lora.targetModules names lm_head, which this model shares with its input embeddings (tie_word_embeddings). "
            "Leave it out.",
        )


def target_modules(base: Any, lora: ResolvedLora) -> str | list[str]:
    """In peft's words, which takes all-linear only for all layers, full names where we take patterns, and in a mixture of experts more layers than
    there are adapters for."""
    routed = routed_kinds(name for name, _ in base.named_parameters())
    layers = [name for name in linear_layers(base) if name.rpartition(".")[2] not in routed]
    if lora.target_modules != [ALL_LINEAR]:
        # peft takes a full name whatever layers_to_transform says.
        outside = {name for name in layers if is_left_out(name, [], lora.layers_to_transform)}
        return [name for name in without_patterns(lora.target_modules, layers) if name not in outside]
    if lora.layers_to_transform is None and not routed:
        return ALL_LINEAR
    return kinds(layers)


def by_full_name(base: Any, pattern: dict[str, int]) -> dict[str, int]:
    """A pattern with an entry of its own for each module: peft takes the first name that fits, and sorts them in the file."""
    named = [n for n, _ in base.named_modules() if is_named(n, pattern)]
    return {name: setting_of(name, pattern, 0) for name in named}


def saved_modules(base: Any, lora: ResolvedLora) -> list[str]:
    """Full names of the modules that are trained whole: peft would take ``norm`` for ``input_layernorm`` too."""
    return [name for name, _ in base.named_modules() if is_named(name, lora.modules_to_save)]


def linear_layers(base: Any) -> list[str]:
    """The full names of the linear layers but the output head."""
    head = base.get_output_embeddings()
    return [n for n, m in base.named_modules() if isinstance(m, torch.nn.Linear | Conv1D) and m is not head]


def kinds(layers: Collection[str]) -> list[str]:
    """The last parts of layers' names."""
    return sorted({name.rpartition(".")[2] for name in layers})


def make_trainables_float32(model: Any) -> None:
    """Trainables are float32, always: in bfloat16 an update below 1/256 of a weight is lost in rounding.

    peft and trl cast to bfloat16 in some combinations (4-bit bases above all), so it is set here and asserted before training.
    """
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def take_inputs_as_they_are(model: PeftModel) -> None:
    """Let adapters multiply a layer's own input, as autocast does with what it is given.

    peft 0.21 casts the input to an adapter's float32 first, and autocast casts that back: the same numbers, in a copy for each layer, which is
    kept for the backward pass. Not where something is computed between the two casts: dropout divides, DoRA takes norms.
    """
    for module in model.get_base_model().modules():
        if isinstance(module, LoraLayer):
            module.cast_input_dtype_enabled = False


def assert_trainables_float32(model: Any) -> int:
    """How many weights are trained.

    Raises:
        AssertionError: one of them is not float32, or there is none.
    """
    wrong = [n for n, p in model.named_parameters() if p.requires_grad and p.dtype is not torch.float32]
    assert not wrong, f"trainable weights that are not float32: {wrong[:3]}"
    count = sum(int(p.numel()) for p in model.parameters() if p.requires_grad)
    assert count, "nothing is trainable"
    return count


def trained_base_weights(model: Any) -> dict[str, torch.Tensor]:
    """Copies of the base's own weights that training will change (biases), by their names in the base."""
    return {
        n.replace(".base_layer.", "."): p.detach().clone()
        for n, p in model.get_base_model().named_parameters()
        if p.requires_grad and "lora_" not in n and SAVED not in n and ROWS not in n
    }


def detach_adapter(model: PeftModel, original: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    """The bare base as it was before training: adapter layers removed, trained biases put back, and modules that were trained whole."""
    replaced = {
        name: module.original_module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    }
    base = model.unload()  # which leaves the trained modules in their places
    for name, module in replaced.items():
        base.set_submodule(name, module)
    parameters = dict(base.named_parameters())
    for name, value in original.items():
        parameters[name].data = value.to(dtype)
    base.requires_grad_(False)
    # peft leaves its configuration on the model, and would stack a second adapter upon it with a warning only.
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        base.__dict__.pop(attribute, None)
    left = [n for n, _ in base.named_modules() if "lora_" in n or SAVED in n or "token_adapter" in n]
    assert not left, f"adapter layers that were not removed: {left[:3]}"
    return base
