"""A plan as a table."""

from __future__ import annotations

from rich.table import Table

from finetune_api.planner import Choice, Gpu
from finetune_api.planner.sentences import gib


def plan_table(name: str, choice: Choice, gpu: Gpu) -> Table:
    """One row per thing that takes memory, and the peaks below."""
    planned, request = choice.planned, choice.request
    table = Table(title=f"{name}: {choice.method} on {request.gpus} × {gpu.name}", title_justify="left")
    table.add_column("per GPU")
    table.add_column("memory", justify="right")
    for label, size in (
        ("weights", planned.weight_bytes),
        ("quantization constants", planned.quantization_constant_bytes),
        ("trained, float32", planned.adapter_bytes),
        ("gradients", planned.gradient_bytes),
        (f"optimizer ({request.optimizer})", planned.optimizer_bytes),
        ("activations", planned.activation_bytes),
        ("head and loss", planned.logits_bytes),
        ("gathered layers (unverified)", planned.gathered_bytes),
        ("communication (unverified)", planned.communication_bytes),
        ("CUDA context (allowance)", planned.context_bytes),
        ("fragmentation (allowance)", planned.fragmentation_bytes),
    ):
        if size:
            table.add_row(label, gib(size))
    table.add_section()
    table.add_row("peak of training", gib(planned.peak_training_bytes))
    table.add_row("peak of loading", gib(planned.peak_loading_bytes))
    table.add_row("usable, less the 5 % margin", gib(choice.fit.limit_bytes))
    table.add_section()
    table.add_row("activations with checkpointing", gib(planned.activation_bytes_with_checkpointing))
    table.add_row("activations without", gib(planned.activation_bytes_without_checkpointing))
    table.add_row("host memory (estimate)", gib(planned.host_memory_bytes))
    table.add_row("disk", gib(planned.disk_bytes))
    if planned.work.gpu_hours is not None and request.run_tokens:
        table.add_row("GPU-hours (estimate)", f"{planned.work.gpu_hours:.1f}")
    return table
