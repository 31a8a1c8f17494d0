"""What the page and the model card both say of a run: its method, its data, its cost. One list, so that neither knows more than the other."""

from __future__ import annotations

from collections.abc import Iterable

from finetune_api.optimizers import SCHEDULE_FREE
from finetune_api.planner import Layout
from finetune_api.results import DataSummary, RunPlan, TrainResult
from finetune_api.snapshot import ResolvedLora, ResolvedMethod, Snapshot
from finetune_api.spec import Full, LoraBias, LoraInitialization, PiiPolicy, Quantization

Facts = list[tuple[str, str]]
"""Names and values, in the order in which they are shown."""


def method_facts(snapshot: Snapshot, method: ResolvedMethod, plan: RunPlan | None, trained: TrainResult) -> Facts:
    """How it was trained, with every default resolved.

    Args:
        snapshot: with the settings of the adapter that training went on from, if it did.
        method: what ``Auto`` became.
    """
    training = snapshot.spec.training
    return [
        *([("method", f"Full, {_weights(method.full)}")] if method.full else _adapter(method)),
        ("base weights", _quantized(method.quantization) if method.quantization else str(trained.base_dtype)),
        ("trained parameters", f"{trained.trainable_parameters:,} (float32)"),
        ("batch", _batch(snapshot, trained)),
        *_optional(("layout", _layout(snapshot, plan))),
        ("optimizer", _optimizer(snapshot)),
        ("seed", str(training.seed)),
    ]


def _weights(full: Full) -> str:
    if full.spectrum is not None:
        return f"Spectrum: {full.spectrum.fraction:g} of each kind of matrix, by signal-to-noise ratio"
    return f"modules {', '.join(full.modules)}" if full.modules else "all weights"


def _adapter(method: ResolvedMethod) -> Facts:
    lora = method.lora
    return [
        ("method", f"{method.type.value}, {_update(lora)}"),
        ("layers", _layers(lora)),
        *_optional(
            ("ranks and alphas of single modules", _patterns(lora)),
            ("experts, each", ", ".join(lora.target_parameters)),
            ("trained whole", ", ".join(lora.modules_to_save)),
            ("biases", "" if lora.bias is LoraBias.NONE else lora.bias.value),
        ),
    ]


def data_facts(snapshot: Snapshot, data: DataSummary) -> Facts:
    """What it was trained and measured on."""
    redacted = snapshot.spec.data.checks.pii is PiiPolicy.REDACT
    lengths = data.tokens
    return [
        ("rows", f"{data.rows:,}: {data.train_rows:,} trained on, {data.held_out_rows:,} held out"),
        ("formats", _counts(data.formats)),
        ("tokens", f"{data.train_tokens:,} in training rows, {data.train_target_tokens:,} learned"),
        ("row lengths", f"median {lengths.p50}, 95 % {lengths.p95}, 99 % {lengths.p99}, longest {lengths.max} tokens"),
        ("unusable, dropped, truncated", f"{data.bad_rows}, {data.dropped_rows}, {data.truncated_rows}"),
        ("exact, near duplicates", f"{data.duplicate_rows}, {data.near_duplicate_rows}"),
        *_optional((f"personal data {'replaced' if redacted else 'found'}", _counts(data.pii))),
    ]


def cost_facts(plan: RunPlan | None, trained: TrainResult) -> Facts:
    """Memory, throughput and time."""
    metrics = trained.metrics
    planned = f" (planned: {size(plan.peak_allocated_bytes)})" if plan else ""
    expected = f" (planned: {duration(plan.estimated_seconds)})" if plan and plan.estimated_seconds else ""
    return [
        ("device", f"{trained.device}, {metrics.tokens_per_second:,.0f} tokens/s"),
        (
            "measured peak on a GPU",
            size(metrics.peak_gpu_bytes) + planned if metrics.peak_gpu_bytes else "none: trained on a CPU",
        ),
        (
            "optimizer steps",
            f"{metrics.steps:,} ({metrics.epochs:.2f} epochs) in {duration(metrics.train_seconds)}{expected}",
        ),
    ]


def size(count: int) -> str:
    """``168 MiB``."""
    amount, unit = float(count), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.0f} {unit}" if amount >= 10 or unit == "B" else f"{amount:.1f} {unit}"


def duration(seconds: float) -> str:
    """``1 h 02 min``, ``4 min 10 s``, ``12 s``."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 60} min {whole % 60:02d} s" if whole >= 60 else f"{whole} s"


def _optional(*facts: tuple[str, str]) -> Iterable[tuple[str, str]]:
    return (fact for fact in facts if fact[1])


def _update(lora: ResolvedLora) -> str:
    parts = [f"rank {lora.rank}, alpha {lora.alpha}, dropout {lora.dropout:g}"]
    parts += ["rsLoRA"] if lora.use_rslora else []
    parts += ["DoRA"] if lora.use_dora else []
    parts += [f"LoRA+ {lora.loraplus_lr_ratio:g}"] if lora.loraplus_lr_ratio else []
    if lora.initialization is not LoraInitialization.DEFAULT:
        doubled = " (published with twice the rank and alpha)" if lora.begins_at_weights else ""
        parts.append(f"initialized by {lora.initialization.value}{doubled}")
    return ", ".join(parts)


def _layers(lora: ResolvedLora) -> str:
    parts = ", ".join(lora.target_modules)
    if lora.exclude_modules:
        parts += f" without {', '.join(lora.exclude_modules)}"
    if lora.layers_to_transform is not None:
        parts += f", of decoder layers {', '.join(map(str, lora.layers_to_transform))}"
    return parts


def _patterns(lora: ResolvedLora) -> str:
    ranks = [f"{name} rank {rank}" for name, rank in lora.rank_pattern.items()]
    return ", ".join(ranks + [f"{name} alpha {alpha}" for name, alpha in lora.alpha_pattern.items()])


def _quantized(quantization: Quantization) -> str:
    double = ", double quantization" if quantization.doubled else ""
    return f"{quantization.bits} bit {quantization.type.value}{double}"


def _batch(snapshot: Snapshot, trained: TrainResult) -> str:
    training = snapshot.spec.training
    at_once = f" ({trained.split.micro_batch_sequences} at a time)" if trained.split else ""
    packed = ", packed" if training.packing else ""
    longest = trained.split.max_sequence_tokens if trained.split else training.max_sequence_tokens
    return f"{training.global_batch_sequences} sequences a step{at_once}{packed}, at most {longest:,} tokens each"


def _layout(snapshot: Snapshot, plan: RunPlan | None) -> str:
    if plan is None or plan.layout is Layout.SINGLE:
        return ""
    gpus = snapshot.spec.compute.nodes * (plan.gpus_per_node or snapshot.spec.compute.gpus() or 1)
    nodes = f" on {snapshot.spec.compute.nodes} nodes" if snapshot.spec.compute.nodes > 1 else ""
    return f"{plan.layout.value} over {gpus} GPU{'s' if gpus != 1 else ''}{nodes}"


def _optimizer(snapshot: Snapshot) -> str:
    training = snapshot.spec.training
    optimizer, warmup = training.optimizer, training.warmup
    warm = f"{warmup.steps} steps" if warmup.steps is not None else f"{100 * (warmup.fraction or 0):g} % of the steps"
    parts = [
        optimizer.name.value,
        f"peak learning rate {snapshot.plan.learning_rate:g}",
        f"{training.scheduler.value} after {warm} of warm-up",
        f"weight decay {optimizer.weight_decay:g}",
        f"gradients clipped at {optimizer.max_grad_norm:g}" if optimizer.max_grad_norm else "gradients not clipped",
    ]
    if galore := snapshot.plan.galore:
        parts.append(
            f"rank {galore.rank}, projected anew every {galore.update_interval_steps} steps, scale {galore.scale:g}"
        )
    parts += ["the average of the weights"] if optimizer.name in SCHEDULE_FREE else []
    parts += [f"NEFTune {training.neftune_noise_alpha:g}"] if training.neftune_noise_alpha else []
    return ", ".join(parts)


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())
