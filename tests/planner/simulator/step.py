"""The simulated run: base, adapter, optimizer step, and the micro-batch after it, whose peak is a run's peak."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any
from unittest import mock

import torch
import transformers.masking_utils as masking
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_trainer.train.loss import LearnedTokenLoss, head_stands_apart
from finetune_trainer.train.model import make_trainables_float32, take_inputs_as_they_are
from finetune_trainer.train.offset_lora import make_offset
from tests.planner.simulator.gpu_kernels import cuda_kernels
from tests.planner.simulator.linear4bit import quantize
from tests.planner.simulator.tracker import LiveStorages

GRADIENT_CLIP = 1.0


@dataclass(frozen=True)
class Case:
    """What is simulated."""

    model: str
    quantized: bool
    sequence_tokens: int
    micro_batch_sequences: int
    checkpointing: bool
    attention: str = "sdpa"
    rank: int = 16
    dropout: float = 0.05
    target_modules: tuple[str, ...] = ("all-linear",)
    double_quantization: bool = True
    eight_bit: bool = False
    """A quantized base is held in 8 bit, not in 4."""
    offset: bool = False
    """The adapter begins at parts of the weights (PiSSA, OLoRA)."""

    @property
    def padded(self) -> bool:
        """Rows of unlike length in one batch: some are padded, so attention gets a mask."""
        return self.micro_batch_sequences > 1

    def name(self) -> str:
        """A file name's stem."""
        method = "qlora" if self.quantized else "lora"
        single = "" if self.double_quantization else "-single"
        targets = "" if self.target_modules == ("all-linear",) else "-" + "".join(m[0] for m in self.target_modules)
        check = "checkpointed" if self.checkpointing else "kept"
        drop = "" if self.dropout else "-nodropout"
        return (
            f"{self.model}-{method}{self.rank}{single}{targets}{drop}-{self.micro_batch_sequences}x{self.sequence_tokens}"
            f"-{check}-{self.attention}"
        )


@dataclass(frozen=True)
class Simulated:
    """Bytes, each storage rounded up to 512."""

    base_bytes: int
    """The base and its buffers."""
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    held_bytes: int
    """Alive between two micro-batches."""
    step_peak_bytes: int
    """The most during a micro-batch."""
    evaluation_peak_bytes: int
    """The most during a forward pass without gradients; 0 where it was not simulated."""
    trainable_parameters: int
    total_parameters: int

    def to_json_dict(self) -> dict[str, int]:
        """As stored."""
        return asdict(self)


def simulate(case: Case, config: dict[str, Any], evaluation_tokens: int = 0, fake: bool = True) -> Simulated:
    """Run it. About 10 s for an 8B model.

    Args:
        config: the model's config.json.
        evaluation_tokens: also simulate an evaluation batch of rows of ``sequence_tokens`` up to so many tokens.
        fake: False computes with real tensors (of no meaning) on the CPU, to compare.
    """
    live = LiveStorages()
    model = adapted(case, config)
    parameters = sum(p.numel() for n, p in bare(case, config).named_parameters())
    tensors = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with tensors, live, known_padding(case.padded), cuda_kernels():
        materialize(model, lambda name: "lora_" not in name)
        base_bytes = live.live_bytes
        materialize(model, lambda name: "lora_" in name)
        adapter_bytes = live.live_bytes - base_bytes
        trainables = [p for p in model.parameters() if p.requires_grad]
        model.train()
        if case.checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        loss = LearnedTokenLoss(model.get_base_model())
        loss.head_apart = head_stands_apart(model.config)
        micro_batch(loss, case.micro_batch_sequences, case.sequence_tokens)
        gradients = live.live_bytes - base_bytes - adapter_bytes
        optimizer = torch.optim.AdamW(trainables, fused=True)
        torch.nn.utils.clip_grad_norm_(trainables, GRADIENT_CLIP)
        optimizer.step()
        held = live.live_bytes
        live.reset_peak()
        micro_batch(loss, case.micro_batch_sequences, case.sequence_tokens)
        peak = live.peak_bytes
        evaluation = 0
        if evaluation_tokens:
            live.reset_peak()
            evaluate(loss, model, max(1, evaluation_tokens // case.sequence_tokens), case.sequence_tokens)
            evaluation = live.peak_bytes
    return Simulated(
        base_bytes=base_bytes,
        adapter_bytes=adapter_bytes,
        gradient_bytes=gradients,
        optimizer_bytes=held - base_bytes - adapter_bytes - gradients,
        held_bytes=held,
        step_peak_bytes=peak,
        evaluation_peak_bytes=evaluation,
        trainable_parameters=sum(p.numel() for p in trainables),
        total_parameters=parameters,
    )


def bare(case: Case, config: dict[str, Any]) -> Any:
    """The base on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**config), dtype=torch.bfloat16, attn_implementation=case.attention
        )


def adapted(case: Case, config: dict[str, Any]) -> Any:
    """Base and adapter on the meta device, as :mod:`finetune_trainer.train.model` makes them."""
    base = bare(case, config)
    base.config.use_cache = False
    base.requires_grad_(False)
    with torch.device("meta"):
        if case.quantized:
            quantize(base, case.double_quantization, case.eight_bit)
        targets = "all-linear" if case.target_modules == ("all-linear",) else list(case.target_modules)
        lora = LoraConfig(
            r=case.rank,
            lora_alpha=2 * case.rank,
            lora_dropout=case.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(base, lora)
        make_trainables_float32(model)
        if case.offset:
            make_offset(model)
        if not case.dropout:
            take_inputs_as_they_are(model)
    return model


def materialize(model: Any, wanted: Callable[[str], bool]) -> None:
    """Put fakes in the place of meta tensors; what is shared (tied weights) stays shared."""
    made: dict[int, Any] = {}
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or not parameter.is_meta or not wanted(f"{prefix}.{name}"):
                continue
            if id(parameter) not in made:
                tensor = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
                made[id(parameter)] = (parameter, nn.Parameter(tensor, requires_grad=parameter.requires_grad))
            module._parameters[name] = made[id(parameter)][1]
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta and wanted(f"{prefix}.{name}"):
                module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def batch(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """As :func:`finetune_trainer.train.rows.collate` makes them."""
    shape = (rows, tokens)
    return {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask", "labels")}


def micro_batch(loss: LearnedTokenLoss, rows: int, tokens: int) -> None:
    """As :meth:`finetune_trainer.train.trainer.LoraTrainer.compute_loss` and Trainer's training_step."""
    inputs = batch(rows, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(inputs) / rows
    value.backward()


def evaluate(loss: LearnedTokenLoss, model: Any, rows: int, tokens: int) -> None:
    """As :func:`finetune_trainer.train.evaluate.held_out_loss`."""
    model.eval()
    inputs = batch(rows, tokens)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        loss.nll_and_right(inputs)


@contextmanager
def known_padding(padded: bool) -> Iterator[None]:
    """Answer "is nothing padded?" without reading the mask's values, which a fake has not."""
    with (
        mock.patch.object(masking, "fast_all", return_value=not padded),
        mock.patch.object(masking, "is_tracing", return_value=False),
    ):
        yield
