"""The plan of one run: everything a GPU will hold, and what it costs. Pure arithmetic over shapes."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Annotated

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.planner import activations, full, weights
from finetune_api.planner.architecture import Architecture
from finetune_api.planner.compute import Work, training_flop_per_token, work
from finetune_api.planner.distributed import Layout, communication, offloaded, pinned, sharded
from finetune_api.planner.layer_memory import layer_memory
from finetune_api.planner.linears import Linear, adapted_layers, linear_layers, matrix_parameters, trainable_parameters
from finetune_api.planner.loss_memory import evaluated_tokens
from finetune_api.planner.tensors import Shapes, parameters
from finetune_api.planner.workload import Batch, Count, Tuning

CONTEXT_BYTES = 600 << 20
"""CUDA context, loaded kernels and cuBLAS' workspace (PyTorch's notes on CUDA semantics: 8 MiB, on Hopper 32 MiB): an
allowance; nvidia-smi shows 400 to 600 MiB for an idle process that has multiplied once."""
FRAGMENTATION = 0.05
"""Share of what comes and goes within a step that the caching allocator cannot reuse: an allowance."""
HOST_BYTES = 4 << 30
"""A process with torch and CUDA loaded, and the data loader: an allowance, not measured on a GPU. A QLoRA of a 135M on a CPU, model,
activations and supervisor included, peaks at 1.6 GiB (docs/benchmarks.md); the rest is for what only a GPU has: CUDA's libraries and kernels,
pinned buffers, NCCL. A checkpoint's copy of the adapter and the optimizer's moments comes on top."""
PASSES = 2
"""How often a layer comes from host memory for a micro-batch: forward and backward; recomputing its activations is part of the latter."""
CHECKPOINTS_IN_MEMORY = 4
"""The one that is being written, the best and the newest that wait, and the one that is being copied from the GPU. Those of an adapter are
too small to count more than once."""
CHECKPOINTS_ON_DISK = 2
"""The newest, and the one that is being uploaded. Those of an adapter are too small to count."""
EVALUATION_TOKENS = 16384
"""Most tokens of a batch of held-out rows on a GPU."""
ANSWERED_AT_ONCE, ANSWER_TOKENS = 8, 8192
"""Prompts that are answered together, and their tokens, answers included. They bound the cache of keys and values: an 8B with
grouped-query attention keeps 128 KiB a token, so a gibibyte."""


class Decisive(StrEnum):
    """What needs the most memory."""

    LOADING = "Loading"
    TRAINING = "Training"
    EVALUATION = "Evaluation"


class Request(ApiModel):
    """What to plan."""

    architecture: Architecture
    shapes: Shapes
    """Every parameter of the base (:mod:`finetune_api.planner.tensors`)."""
    tuning: Tuning = Tuning()
    batch: Batch = Batch()
    optimizer: str = "adamw_torch_fused"
    layout: Layout = Layout.SINGLE
    gpus: Count = 1
    evaluation_tokens: Count = EVALUATION_TOKENS
    """Tokens of an evaluation batch."""
    generation_prompts: Annotated[int, Field(ge=0)] = 0
    """Held-out prompts that are answered, a few at once, each as long as a row may be."""
    generation_new_tokens: Count = 64
    run_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens trained on in the whole run, padding not counted."""


class MemoryPlan(ApiModel):
    """Bytes per GPU, unless the name says otherwise."""

    weight_bytes: int
    quantization_constant_bytes: int
    adapter_bytes: int
    """The trained weights in float32: the adapter's, or with full weights the model's own."""
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """The most that layers need at one time, as planned (with or without checkpointing)."""
    activation_bytes_with_checkpointing: int
    activation_bytes_without_checkpointing: int
    logits_bytes: int
    """The most that head and loss need, at another time than the layers' most."""
    gathered_bytes: int
    """Unverified: sharded units put together when a step needs the most."""
    communication_bytes: int
    """Unverified: messages and buffers of collectives at that time."""
    context_bytes: int
    """An allowance."""
    fragmentation_bytes: int
    """An allowance."""
    peak_allocated_bytes: int
    """What torch.cuda.max_memory_allocated would show at the end of a training step."""
    peak_evaluation_bytes: int
    """The same for held-out batches and answers to prompts, before and after training."""
    peak_training_bytes: int
    """The most of both, with context and fragmentation."""
    peak_loading_bytes: int
    """While the base is read (and quantized, a tensor at a time), context included."""
    host_memory_bytes: int
    """Of the first process, which copies checkpoints; an estimate."""
    offloaded_bytes: int = 0
    """The base in host memory, part of ``host_memory_bytes``."""
    copied_bytes: int = 0
    """What of ``host_memory_bytes`` only the first process needs: with full weights all copies of checkpoints but one, which every process takes
    up when a run goes on."""
    disk_bytes: int
    """Of the training pod: the model's files and the trained weights twice (saved, and fetched back); with full weights also checkpoints."""
    trainable_parameters: int
    total_parameters: int
    work: Work
    verified: bool
    """The model's family and the layout are among those compared with simulated runs."""

    @property
    def needed_bytes(self) -> int:
        """What a GPU must have."""
        return max(self.peak_training_bytes, self.peak_loading_bytes)

    @property
    def measurable_bytes(self) -> int:
        """What torch.cuda.max_memory_allocated should show after loading, evaluation and training: tensors only."""
        loading = self.peak_loading_bytes - self.context_bytes
        return max(loading, self.peak_allocated_bytes, self.peak_evaluation_bytes)

    @property
    def decisive(self) -> Decisive:
        """When that is needed."""
        if self.peak_loading_bytes > self.peak_training_bytes:
            return Decisive.LOADING
        return Decisive.EVALUATION if self.peak_evaluation_bytes > self.peak_allocated_bytes else Decisive.TRAINING


def plan(request: Request, peak_tflops: float | None = None, sustained_tflops: float | None = None) -> MemoryPlan:
    """Plan a run.

    Raises:
        UnknownTarget: targetModules name no linear layer.
    """
    arch, tuning, batch, shapes = request.architecture, request.tuning, request.batch, request.shapes
    quantized = weights.quantized_names(shapes, arch, tuning)
    base = weights.tensor_bytes(shapes, quantized, tuning)
    with_weights = weights.quantization_bytes(shapes, quantized, tuning, arch)
    chosen = full.trained(shapes, tuning)
    trainable = parameters(chosen) if tuning.full else trainable_parameters(shapes, arch, tuning)
    linears = linear_layers(shapes, arch)
    targets = full.trained_linears(chosen, linears) if tuning.full else adapted_layers(linears, tuning)
    frozen = matrix_parameters(targets, tuning) if tuning.offset else 0
    units = {name: size + with_weights.get(name, 0) for name, size in base.items()}
    shared = communication(request.layout, units, trainable, request.gpus, arch)

    adapter = 4 * (trainable + frozen)
    if tuning.full:
        optimizer = full.state_bytes(request.optimizer, chosen, targets, tuning)
    else:
        optimizer = weights.optimizer_bytes(request.optimizer, trainable, weights.trained_embedding(shapes, tuning))
    loaded = sharded(base, request.layout, request.gpus, arch.tied_embeddings)
    weight = loaded - weights.HALF * parameters(chosen)  # float32 takes the place of the trained ones
    constants = sharded(with_weights, request.layout, request.gpus, tied=False)
    offload = offloaded(units, request.gpus, arch.tied_embeddings) if request.layout is Layout.CPU_OFFLOAD else []
    held = weight + constants + adapter + 4 * trainable + optimizer + shared.buffer_bytes
    steps = {
        checkpointing: _step(
            request,
            batch.model_copy(update={"gradient_checkpointing": checkpointing}),
            trainable + frozen,
            chosen,
            linears,
            targets,
        )
        for checkpointing in (True, False)
    }
    step = steps[batch.gradient_checkpointing]
    mlp_adapted = not tuning.full and any(".mlp." in target.name for target in targets)
    # Matrices that are put together for each product have no copy that autocast keeps.
    # Copies of full weights in half precision exist one at a time.
    copied = max(math.prod(shape) for shape in chosen.values()) if tuning.full else trainable - frozen
    most = shared.decisive(step)
    evaluation = _evaluation(request, quantized, mlp_adapted, copied) + shared.evaluation_bytes
    fragmentation = int(FRAGMENTATION * max(most.bytes, evaluation))
    # In 8 bit a tensor is there as it was loaded, and once more in float16 (transformers' Bnb8bitQuantize, bitsandbytes' Int8Params).
    unpacked = 4 if tuning.eight_bit else 2
    largest = max((unpacked * math.prod(shapes[name]) for name in quantized), default=0)
    # The old embeddings beside the new ones, after all else is loaded.
    resizing = weights.token_copy_bytes(arch, tuning)
    more_checkpoints = (CHECKPOINTS_IN_MEMORY - 1) * (adapter + optimizer) if tuning.full else 0
    flop = training_flop_per_token(arch, shapes, targets, tuning, batch)
    return MemoryPlan(
        weight_bytes=weight,
        quantization_constant_bytes=constants,
        adapter_bytes=adapter,
        gradient_bytes=4 * trainable,
        optimizer_bytes=optimizer,
        activation_bytes=step.kept_bytes + step.working_bytes,
        activation_bytes_with_checkpointing=steps[True].kept_bytes + steps[True].working_bytes,
        activation_bytes_without_checkpointing=steps[False].kept_bytes + steps[False].working_bytes,
        logits_bytes=step.loss_bytes,
        gathered_bytes=most.gathered_bytes,
        communication_bytes=most.message_bytes + shared.buffer_bytes,
        context_bytes=CONTEXT_BYTES,
        fragmentation_bytes=fragmentation,
        peak_allocated_bytes=held + most.bytes,
        peak_evaluation_bytes=held + evaluation,
        peak_training_bytes=held + max(most.bytes, evaluation) + fragmentation + CONTEXT_BYTES,
        peak_loading_bytes=loaded + constants + shared.loading_bytes + max(largest, resizing) + CONTEXT_BYTES,
        host_memory_bytes=HOST_BYTES
        + max(2 * math.prod(shape) for shape in shapes.values())
        + (adapter + optimizer + more_checkpoints if tuning.full else 4 * (3 * trainable + frozen))
        + pinned(offload),
        copied_bytes=more_checkpoints,
        offloaded_bytes=pinned(offload),
        disk_bytes=weights.checkpoint_bytes(shapes)
        + 2 * adapter
        + (CHECKPOINTS_ON_DISK * (adapter + optimizer) if tuning.full else 0),
        trainable_parameters=trainable,
        total_parameters=parameters(shapes),
        work=work(
            flop,
            request.run_tokens,
            request.gpus,
            peak_tflops,
            sustained_tflops,
            PASSES * sum(offload) * request.run_tokens / (batch.tokens * request.gpus),
        ),
        verified=arch.compared
        and not tuning.dora
        and not tuning.full
        and not tuning.token_rows
        and request.layout is Layout.SINGLE,
    )


def _step(
    request: Request, batch: Batch, copied: int, chosen: Shapes, linears: list[Linear], targets: list[Linear]
) -> activations.StepMemory:
    arch, tuning, shapes = request.architecture, request.tuning, request.shapes
    # All layers are taken to be as the one that is adapted the most.
    adapted: dict[int, int] = {}
    for target in targets:
        adapted[target.layer] = adapted.get(target.layer, 0) + target.inputs + target.outputs
    first = max(sorted(adapted), key=adapted.__getitem__, default=0)
    layer = layer_memory(
        arch,
        tuning,
        batch,
        [layer for layer in linears if layer.layer == first],
        [layer for layer in targets if layer.layer == first],
        bool(weights.quantized_names(shapes, arch, tuning)),
    )
    step = activations.step_memory(arch, batch, layer, copied)
    if not tuning.full:
        # The head's copy, and its gradient of all rows, of which those of the trained tokens are taken.
        copies = 2 * weights.token_copy_bytes(arch, tuning)
        # Experts' copies are kept as activations are, and their gradients are there a layer at a time.
        layer_experts, all_experts = weights.expert_copies(shapes, tuning)
        kept, working = (0, 2 * layer_experts) if batch.gradient_checkpointing else (all_experts, layer_experts)
        return step.model_copy(
            update={
                "kept_bytes": step.kept_bytes + kept,
                "working_bytes": step.working_bytes + working,
                "loss_bytes": step.loss_bytes + copies,
            }
        )
    return step.model_copy(
        update={
            # The optimizer's turn comes after that of the products.
            "working_bytes": step.working_bytes
            + max(full.product_bytes(chosen), full.update_bytes(request.optimizer, chosen, targets, tuning)),
            "loss_bytes": step.loss_bytes + full.head_bytes(chosen, arch.tied_embeddings),
        }
    )


def _evaluation(request: Request, quantized: set[str], mlp_adapted: bool, copied: int) -> int:
    arch, tokens = request.architecture, request.batch.sequence_tokens
    widest = max((2 * math.prod(request.shapes[name]) for name in quantized), default=0)

    def rows(count: int) -> tuple[Batch, int]:
        batch = request.batch.model_copy(update={"micro_batch_sequences": count})
        return batch, activations.forward_bytes(arch, batch, bool(quantized), mlp_adapted, widest)

    peak = activations.evaluation_bytes(
        arch, *rows(max(1, evaluated_tokens(arch, request.evaluation_tokens) // tokens)), copied
    )
    if request.generation_prompts:
        fitting = max(1, ANSWER_TOKENS // (tokens + request.generation_new_tokens))
        prompts = min(request.generation_prompts, ANSWERED_AT_ONCE, fitting)
        answers = activations.generation_bytes(arch, *rows(prompts), copied, request.generation_new_tokens)
        peak = max(peak, answers)
    layer_experts, _ = weights.expert_copies(request.shapes, request.tuning)
    return peak + weights.token_copy_bytes(arch, request.tuning) + layer_experts
