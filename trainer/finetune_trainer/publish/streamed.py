"""A forward pass with one layer's weights in memory at a time, so that a 70B is checked in the memory of a layer.

The model is transformers' own code, built without weights; hooks put a module's weights in just before it runs and take
them out just after.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.publish.adapter import Adapter, Lora
from finetune_trainer.publish.safetensors_stream import module_of, rows_per_chunk
from finetune_trainer.publish.stored_weights import Read, StoredWeights, empty_model
from finetune_trainer.train.loss import LearnedTokenLoss, head_stands_apart
from finetune_trainer.train.rows import Rows, collate

LOGITS_BYTES = 32 << 20
"""Most memory for a chunk of float32 logits: what a small layer's weights take."""


class StreamedModel:
    """A causal language model whose weights come from ``read`` when they are needed.

    Args:
        config_folder: folder with config.json (and the model's code, if trusted).
        names: tensors that ``read`` can give, as in the files.
        adapter: in the words of the files; added unmerged, as W·x + scaling · B·(A·x), with DoRA each output at its magnitude.

    Raises:
        StageError: UnsupportedModel, if the files lack weights of the model.
    """

    def __init__(
        self, config_folder: Path, names: set[str], read: Read, dtype: torch.dtype, *,
        adapter: Adapter | None = None, trust_remote_code: bool = False,
    ) -> None:  # fmt: skip
        self.model = empty_model(config_folder, dtype, trust_remote_code)
        self.model.eval().requires_grad_(False)
        self._read = with_experts(read, adapter) if adapter is not None and adapter.parts else read
        self._dtype = dtype
        self._stored = StoredWeights(self.model, names)
        if adapter is not None:
            for name, tensor in self._stored.alone.items():
                if name.endswith(".weight") and module_of(tensor) in adapter.modules:
                    module = self.model.get_submodule(module_of(name))
                    module.register_forward_hook(_adapter_hook(adapter, module_of(tensor)))
        for name, module in streamed_modules(self.model):
            module.register_forward_pre_hook(self._filler(name))
            module.register_forward_hook(_emptier)

    def loss(self, rows: Rows, indices: list[int], pad_id: int) -> float:
        """Σ NLL / Σ tokens over the learned tokens of ``indices``, in one batch."""
        batch = collate(rows, indices, pad_id)
        nll = LearnedTokenLoss(self.model, LOGITS_BYTES)
        # Decided by the configuration alone here: trying it out would stream the whole model twice.
        nll.head_apart = head_stands_apart(self.model.config)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=self._dtype is not torch.float32):
            values = nll.per_token(batch).double()
        return math.fsum(values.tolist()) / max(1, values.numel())

    def _filler(self, prefix: str) -> Callable[..., None]:
        def fill(module: nn.Module, _inputs: Any) -> None:
            for name, _ in list(module.named_parameters()):
                full = f"{prefix}.{name}" if prefix else name
                put(module, name, self._stored.read(full, self._read).to(self._dtype))

        return fill


def with_experts(read: Read, adapter: Adapter) -> Read:
    """The tensors of single experts with their updates: within a parameter of all, outputs have no update of their own."""

    def updated(name: str) -> torch.Tensor:
        value, module = read(name), module_of(name)
        return adapter.lora(module).merged(value).to(value.dtype) if module in adapter.parts else value

    return updated


def streamed_modules(model: Any) -> list[tuple[str, nn.Module]]:
    """The modules that are filled and emptied as a whole: each decoder layer, and every other module with weights of its own."""
    count = model.config.get_text_config().num_hidden_layers
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise StageError(Reason.UNSUPPORTED_MODEL, f"{type(model).__name__} has no list of {count} layers.")
    stack, layers = lists[0]
    found = [(f"{stack}.{i}", layer) for i, layer in enumerate(layers)]
    found += [
        (name, module)
        for name, module in model.named_modules()
        if not name.startswith(f"{stack}.") and next(module.parameters(recurse=False), None) is not None
    ]
    return found


def put(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """Set a parameter below ``module``."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _emptier(module: nn.Module, _inputs: Any, output: Any) -> Any:
    for name, parameter in list(module.named_parameters()):
        put(module, name, torch.empty_like(parameter, device="meta"))
    return output


def row_factors(lora: Lora, weight: torch.Tensor) -> torch.Tensor:
    """By what DoRA multiplies each output, a few rows of W + ΔW in memory at a time."""
    step = rows_per_chunk(tuple(weight.shape))
    parts = ((lora.rows(start, step), weight[start : start + step]) for start in range(0, len(weight), step))
    return torch.cat([part.factor(part.sum_with(rows)) for part, rows in parts])


def _adapter_hook(adapter: Adapter, name: str) -> Callable[..., torch.Tensor]:
    def add(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        lora = adapter.lora(name)
        update = nn.functional.linear(nn.functional.linear(inputs[0], lora.a), lora.b) * lora.scaling
        if lora.magnitude is None:
            return (output + update).to(output.dtype)
        own = module._parameters.get("bias")
        bias = output.new_zeros(1) if own is None else own
        weight = module.get_parameter("weight")
        factors = row_factors(lora, weight.T if isinstance(module, Conv1D) else weight)
        return ((output - bias + update) * factors + bias).to(output.dtype)

    return add
