"""The frozen base shared out over the ranks with FSDP2 (Zhao et al. 2023; torch.distributed.fsdp.fully_shard), read, quantized and
sharded a layer at a time. With CPU offload each rank's part, on one rank the whole, lies in pinned host memory.

What is trained is not sharded: every rank holds the whole adapter, and its gradients are added up as without sharding (ranks.py). So
checkpoints, resumption and the saved adapter are those of any other run, for 4 to 16 bytes a trainable weight on every GPU.

Why not transformers' own loader: it makes the whole model on every rank and shards it then. Stock accelerate needs 39.5 GB a GPU for a
70B in 4 bit, whatever the number of GPUs.
"""

from __future__ import annotations

import logging
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.integrations import replace_with_bnb_linear
from transformers.quantizers.base import get_keys_to_not_convert

from finetune_api.failures import Reason
from finetune_api.results import QuantizedModule
from finetune_api.snapshot import Snapshot
from finetune_api.spec import Quantization
from finetune_trainer.errors import StageError
from finetune_trainer.train.device import Compute
from finetune_trainer.train.model import bits_and_bytes, blaming_the_model
from finetune_trainer.train.quantized import describe
from finetune_trainer.train.ranks import Ranks, alone
from finetune_trainer.weight_files import weight_files

log = logging.getLogger(__name__)

STORAGE = torch.bfloat16
"""The type that packed weights pretend to have. Sharding needs a floating type, and nothing here is ever cast."""
CONSTANTS = "block_constants"


def load_sharded(folder: Path, snapshot: Snapshot, compute: Compute, ranks: Ranks) -> tuple[Any, list[QuantizedModule]]:
    """The base as a causal language model of which this rank holds its part, and the records of its 4-bit weights.

    No rank ever holds more than its part, one whole unit (a decoder layer, the embeddings or the head) and one tensor as it is
    stored. Matrices are sharded; vectors (norms, biases) and tied embeddings are whole on every rank.

    Raises:
        StageError: UnsupportedModel, if the files' tensors are not the model's, one by one.
    """
    with blaming_the_model():
        config = AutoConfig.from_pretrained(
            folder, trust_remote_code=snapshot.spec.model.trust_remote_code, local_files_only=True
        )
        with init_empty_weights():  # parameters on the meta device, buffers (rotary frequencies) real
            model = AutoModelForCausalLM.from_config(
                config, dtype=compute.dtype, trust_remote_code=snapshot.spec.model.trust_remote_code
            )
    model.tie_weights()
    model.eval()
    quantization = snapshot.plan.method.quantization
    if quantization is not None:
        replace_with_bnb_linear(model, get_keys_to_not_convert(model), bits_and_bytes(quantization, compute.dtype))
        model.is_loaded_in_4bit = True
    model.requires_grad_(False)
    model.config.use_cache = False
    move_buffers(model, compute.device)
    group = alone() if ranks.size == 1 else ranks.data or distributed.group.WORLD
    assert group is not None
    mesh = DeviceMesh.from_group(group, compute.device.type)
    policy = CPUOffloadPolicy(pin_memory=compute.device.type != "cpu") if ranks.offloaded else OffloadPolicy()
    records: list[QuantizedModule] = []
    with blaming_the_model(), ExitStack() as opened:
        stored = Stored(folder, opened)
        stored.must_hold(model)
        parts = units(model)
        for name, unit in parts:
            for own, module, key in parameters(unit):
                full = f"{name}.{own}"
                records += fill(module, key, stored.read(full), compute, quantization, full)
            shard(unit, mesh, policy)
        for own, module, key in parameters(model):
            if module.get_parameter(key).is_meta:
                records += fill(module, key, stored.read(own), compute, quantization, own)
    model.tie_weights()
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(head, FSDPModule):
        # See finetune_trainer.train.loss.release. (The embeddings' backward pass needs no weights.)
        head.set_reshard_after_forward(False)
        head.set_reshard_after_backward(False)
        embeddings.set_unshard_in_backward(False)
        for end in (model.get_input_embeddings(), model.get_output_embeddings()):
            end.register_forward_pre_hook(gather, prepend=True)
    root = model.base_model
    fully_shard(root, mesh=mesh, ignored_params=set(root.parameters()))
    must_be_sharded(parts, ranks)
    if (folder / "generation_config.json").exists():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model, records


def units(model: Any) -> list[tuple[str, nn.Module]]:
    """What is gathered for its turn and let go after it, by name: decoder layers, and embeddings and head if they are not one.

    Raises:
        StageError: UnsupportedModel, for a model that does not say what its layers are.
    """
    classes = set(model._no_split_modules or ())
    found = [(n, m) for n, m in model.named_modules() if type(m).__name__ in classes]
    if not found:
        raise StageError(
            Reason.UNSUPPORTED_MODEL,
            f"{type(model).__name__} does not say what its layers are: it cannot be sharded.",
        )
    if not model.config.get_text_config().tie_word_embeddings:
        names = {id(module): name for name, module in model.named_modules()}
        ends = (model.get_input_embeddings(), model.get_output_embeddings())
        found += [(names[id(module)], module) for module in ends]
    return found


def parameters(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Name, owner and attribute of each parameter; of tied ones the first."""
    seen: set[int] = set()
    found = []
    for prefix, owner in module.named_modules():
        for key, parameter in owner._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found.append((f"{prefix}.{key}" if prefix else key, owner, key))
    return found


def fill(
    module: Any, key: str, value: torch.Tensor, compute: Compute, quantization: Quantization | None, name: str
) -> list[QuantizedModule]:
    """Put a stored tensor in a parameter's place; what that quantizes is recorded."""
    value = value.to(compute.dtype)
    if quantization is None or not (hasattr(module, "quant_state") and key == "weight"):
        module._parameters[key] = nn.Parameter(value.to(compute.device), requires_grad=False)
        return []
    from bitsandbytes.nn import Params4bit  # only here: a base that is not quantized needs no bitsandbytes

    module.quant_storage = STORAGE
    packed = Params4bit(
        value,
        requires_grad=False,
        compress_statistics=quantization.doubled,
        quant_type=quantization.type.value.lower(),
        quant_storage=STORAGE,
        module=module,
    ).to(compute.device)
    module._parameters[key] = packed
    module.support_avx512bf16_for_cpu = False  # see keep_training_layout
    record = describe(name.removesuffix(".weight"), packed.data, packed.quant_state)
    share_constants(module)
    return [record]


def share_constants(module: Any) -> None:
    """Make the constants of a weight's blocks a parameter, so that they are sharded and gathered with it: 1 GiB for a 70B."""
    state = module.quant_state
    dtype, as_bytes = state.absmax.dtype, state.absmax.view(torch.uint8)
    if len(as_bytes) % STORAGE.itemsize:
        return
    module.register_parameter(CONSTANTS, nn.Parameter(as_bytes.view(STORAGE)[:, None], requires_grad=False))
    state.absmax = None

    def put_back(owner: nn.Module, _: Any) -> None:
        state.absmax = owner.get_parameter(CONSTANTS)[:, 0].view(dtype)

    # Its storage is emptied and filled again for each turn, as the weight's is: the backward pass finds it there.
    module.register_forward_pre_hook(put_back)


def shard(unit: nn.Module, mesh: DeviceMesh, policy: OffloadPolicy) -> None:
    """Keep this rank's part of the unit's matrices, and let go of the rest."""
    vectors = {p for p in unit.parameters() if p.dim() < 2}
    fully_shard(unit, mesh=mesh, reshard_after_forward=True, ignored_params=vectors, offload_policy=policy)


def gather(unit: nn.Module, _: Any) -> None:
    """Put a unit together before FSDP would, which keeps its message until the unit has computed: for the head of a Llama 3 70B 2 GB beside
    the logits. Called like this it uses the memory that activations use, too, and lets go of the message at once."""
    assert isinstance(unit, FSDPModule)
    unit.unshard()


def ready_for_adapter(model: nn.Module) -> None:
    """peft reads from a 4-bit weight how it was made; a sharded one is another object that does not know."""
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            weight: Any = module.weight
            weight.quant_type = state.quant_type
            weight.compress_statistics = state.nested


def adapter_to(model: nn.Module, device: torch.device) -> None:
    """Put the adapter where products are computed: peft puts it where the base lies, which is host memory for one that is offloaded."""
    for name, module in model.named_modules():
        if name.rpartition(".")[2].startswith("lora_"):
            module.to(device)


def must_be_sharded(parts: list[tuple[str, nn.Module]], ranks: Ranks) -> None:
    """bitsandbytes and FSDP have failed at this with a warning at most.

    Raises:
        AssertionError: a matrix of a unit is whole on this rank.
    """
    for name, unit in parts:
        for own, parameter in unit.named_parameters():
            if parameter.dim() >= 2:
                assert isinstance(parameter, DTensor), f"{name}.{own} is not sharded"
                most = -(-parameter.shape[0] // ranks.size) * math.prod(parameter.shape[1:])
                assert parameter.to_local().numel() <= most, f"{name}.{own} is not sharded"


def move_buffers(model: nn.Module, device: torch.device) -> None:
    """Buffers are small, and whole everywhere."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


class Stored:
    """A model's tensors in its safetensors files, by name; one at a time."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self._where: dict[str, Any] = {}
        for file in weight_files(folder):
            tensors = opened.enter_context(safe_open(folder / file, framework="pt"))
            self._where.update(dict.fromkeys(tensors.keys(), tensors))

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def read(self, name: str) -> torch.Tensor:
        """One tensor, as it is stored."""
        found: torch.Tensor = self._where[name].get_tensor(name)
        return found

    def _shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._where[name].get_slice(name).get_shape())

    def must_hold(self, model: Any) -> None:
        """Raises UnsupportedModel where a tensor of the model is stored under another name or with another shape, or transformers would
        do more than read it."""
        wanted = {name: tuple(module.get_parameter(key).shape) for name, module, key in parameters(model)}
        missing = [name for name in wanted if name not in self._where]
        others = [n for n, shape in wanted.items() if n in self._where and self._shape(n) != shape]
        kept = model._keep_in_fp32_modules or model._keep_in_fp32_modules_strict
        buffers = [m for m in model.modules() if m._buffers.keys() - m._non_persistent_buffers_set]
        what = ""
        if missing:
            what = f"its files have no {', '.join(missing[:3])}"
        elif others:
            what = f"{others[0]} is {list(self._shape(others[0]))} in its files and {list(wanted[others[0]])} by its configuration"
        elif kept:
            what = "it keeps some modules in float32"
        elif buffers:
            what = f"{type(buffers[0]).__name__} keeps more than weights in its files"
        if what:
            raise StageError(
                Reason.UNSUPPORTED_MODEL,
                f"{type(model).__name__} cannot be loaded layer by layer: {what}. Set training.parallelism: DDP, without training.cpuOffload.",
            )
