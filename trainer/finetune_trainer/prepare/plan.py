"""What training will hold on a GPU, and the choices that follow, before a GPU is asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from finetune_api.failures import Reason
from finetune_api.planner import (
    Architecture,
    Choice,
    Gpu,
    Layout,
    Shapes,
    UnknownArchitecture,
    UnknownTarget,
    Unsuitable,
    by_compute_dtype,
    choose_among,
    gpu_counts,
    host_memory_misfit,
    is_shardable,
    labelled_gpu,
    loaded_by_layers,
    misfit_sentence,
    parameter_shapes,
    parse_config,
    plan,
    plan_sentence,
    possible,
    refuses,
    request_of,
    rounds,
)
from finetune_api.planner.choose import layouts
from finetune_api.planner.plan import EVALUATION_TOKENS, Request
from finetune_api.planner.sentences import ESTIMATED_MISFIT, gib, gpu_names
from finetune_api.progress import Split
from finetune_api.quantity import parse_quantity
from finetune_api.results import DataSummary, RunPlan
from finetune_api.snapshot import NodeGpu, rank_count
from finetune_api.spec import MOST_GPUS_PER_NODE, FineTuneJobSpec, MethodType
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.model import BaseModel

log = logging.getLogger(__name__)


def plan_run(
    spec: FineTuneJobSpec,
    split: Split,
    model: BaseModel,
    data: DataSummary,
    node_gpus: Sequence[NodeGpu] | None = None,
) -> RunPlan | None:
    """The plan of a run on GPUs, for the longest row that there is; None on a CPU, and for a model whose sizes are not known.

    Args:
        split: what is done without a plan: the user's micro-batch, or a default.
        node_gpus: what the nodes tell that the training pod may land on.

    Raises:
        StageError: DoesNotFit; InvalidConfig, for Auto with a GPU or a model that nothing is known of, and for what these cannot do.
    """
    if spec.training.use_cpu:
        return None
    try:
        found = candidates_of(spec, node_gpus)
        arch = parse_config(model.config)
        shapes = parameter_shapes(model.shapes, arch)
        request = request_for(spec, arch, shapes, data, len(model.tokens.ids) if model.tokens is not None else 0)
        return from_request(spec, split, request, found, is_shardable(spec, arch, model.shapes), model.uri)
    except Unsuitable as error:
        raise StageError(Reason.INVALID_CONFIG, str(error)) from error
    except (UnknownArchitecture, UnknownTarget) as error:
        if automatic := left_to_the_plan(spec):
            raise StageError(
                Reason.INVALID_CONFIG, f"{automatic}: the memory of this model cannot be planned ({error})."
            ) from error
        if layerwise := loaded_by_layers(spec):
            raise StageError(Reason.INVALID_CONFIG, f"{layerwise}: this model is not known ({error}).") from error
        log.warning("the memory of this model cannot be planned: %s", error)
        return None


@dataclass(frozen=True)
class Candidates:
    """The kinds of GPU that a run may get, as far as anything is known of them."""

    gpus: list[Gpu]
    """Those whose memory is known."""
    named: bool
    """By the job; otherwise nodes tell of them."""
    others: bool = False
    """Nodes have more kinds, and their memory is not known."""
    per_node: Mapping[str, int] = field(default_factory=dict)
    """By product, the most that one node has, where nodes tell."""
    without_bfloat16: list[Gpu] = field(default_factory=list)
    """Kinds on nodes that lack the type that is asked for: none of ``gpus``."""

    def with_count(self, gpus: int) -> list[Gpu]:
        """The kinds of which one node may have so many."""
        return [gpu for gpu in self.gpus if self.per_node.get(gpu.product, MOST_GPUS_PER_NODE) >= gpus]


def candidates_of(spec: FineTuneJobSpec, node_gpus: Sequence[NodeGpu] | None) -> Candidates:
    """What is declared counts, then the product that is asked for, then what nodes tell.

    Raises:
        StageError: InvalidConfig, where Auto needs to know and nothing is known.
        Unsuitable: all GPUs lack the type that is asked for.
    """
    asked = spec.compute.gpu
    nodes = {gpu.product: None if gpu.shared else gpu.memory_mib for gpu in node_gpus or []}
    shared = {gpu.product for gpu in node_gpus or [] if gpu.shared}
    if asked.product is not None or asked.memory is not None:
        name = asked.product or f"GPU with {asked.memory}"
        known = labelled_gpu(name, nodes.get(name))
        if asked.memory is not None:
            usable = int(parse_quantity(asked.memory))
            known = (known or Gpu(product=name, usable_bytes=usable)).model_copy(update={"usable_bytes": usable})
        found = Candidates([known] if known is not None else [], named=True)
    else:
        kinds = [labelled_gpu(product, memory) for product, memory in nodes.items() if product not in shared]
        gpus = [gpu for gpu in kinds if gpu is not None]
        found = Candidates(gpus, named=False, others=len(gpus) < len(nodes))
    able, lacking = by_compute_dtype(spec, found.gpus)
    found = replace(found, gpus=able, without_bfloat16=lacking)
    automatic = left_to_the_plan(spec)
    if not found.gpus and automatic:
        raise StageError(Reason.INVALID_CONFIG, f"{automatic}: {_nothing_known(asked.product, node_gpus)}")
    per_node = {gpu.product: gpu.per_node for gpu in node_gpus or [] if gpu.per_node}
    if per_node and asked.product is None and found.named:
        per_node = {found.gpus[0].product: max(per_node.values())}
    return replace(found, per_node=per_node)


def left_to_the_plan(spec: FineTuneJobSpec) -> str:
    """The field that cannot be settled without a plan; empty if there is none."""
    if spec.method.type is MethodType.AUTO:
        return "method.type: Auto"
    return "compute.gpusPerNode: Auto" if spec.compute.gpus() is None else ""


def _nothing_known(product: str | None, node_gpus: Sequence[NodeGpu] | None) -> str:
    if product is not None:
        return f"{product} is not in the table of GPUs. Declare its memory in compute.gpu.memory."
    told = ", ".join(gpu.product for gpu in node_gpus or [])
    if told:
        why = f"the job names no GPU, and of those that nodes have ({told}) the memory is not known"
    elif node_gpus is not None:
        why = "the job names no GPU, and no node tells of one that it may use"
    else:
        why = "the job names no GPU"
    return f"{why}. Set compute.gpu.product, or declare its memory in compute.gpu.memory."


def request_for(
    spec: FineTuneJobSpec, arch: Architecture, shapes: Shapes, data: DataSummary, token_rows: int = 0
) -> Request:
    """What to plan: rows are as long as the longest, which is often far below the limit.

    Args:
        token_rows: tokens whose rows of the embeddings are trained.
    """
    length = spec.training.length
    epochs = length.epochs or 0.0
    if length.steps is not None:
        epochs = length.steps * spec.training.global_batch_sequences / max(1, data.train_rows)
    request = request_of(
        spec,
        arch,
        shapes,
        gpus=rank_count(spec),
        run_tokens=max(1, round(epochs * data.train_tokens)),
        token_rows=token_rows,
    )
    longest = max(1, min(spec.training.max_sequence_tokens, data.tokens.max))
    return request.model_copy(update={"batch": request.batch.model_copy(update={"sequence_tokens": longest})})


def from_request(
    spec: FineTuneJobSpec, split: Split, request: Request, found: Candidates, shardable: bool, uri: str
) -> RunPlan:
    """Choose, where the GPU is known; otherwise only tell what will be needed.

    Args:
        shardable: whether the model can be loaded and sharded a layer at a time.

    Raises:
        StageError: DoesNotFit.
    """
    tries = rounds(spec, shardable)
    if not found.gpus:
        return _of_unknown(spec, spec.method.type, split, request, tries[0], [], [])
    fewer = ""
    for gpus, several in [(n, may) for may in tries for n in counts_of(spec, may, found)]:
        able = (found.with_count(gpus) if spec.compute.gpus() is None else []) or found.gpus
        choice, suitable = choose_among(
            request.model_copy(update={"gpus": gpus * spec.compute.nodes}),
            able,
            spec.training.global_batch_sequences,
            None if spec.method.type is MethodType.AUTO else spec.method.type,
            spec.training.micro_batch_sequences,
            evaluation_follows=True,
            several=several,
        )
        if choice.fit.fits:
            if misfit := host_memory_misfit(spec, choice):
                raise StageError(Reason.DOES_NOT_FIT, misfit)
            return _chosen(
                spec,
                split,
                choice,
                suitable[0],
                [gpu for gpu in able if gpu not in suitable],
                found.without_bfloat16,
                fewer,
            )
        fewer = f" {gpus} would not do: {gib(choice.planned.needed_bytes)} on each."
    if not refuses(choice):
        return _chosen(spec, split, choice, suitable[0], [], found.without_bfloat16)
    if found.others and spec.compute.gpus() is not None:
        return _of_unknown(spec, choice.method, split, request, tries[-1], found.gpus, found.without_bfloat16)
    here = possible(spec, choice.fit.alternatives, shardable)
    words = misfit_sentence(uri, choice.request, choice.fit.model_copy(update={"alternatives": here}), suitable[0])
    if spec.compute.gpus() is None:
        words += f" No node that it may use has more GPUs than {gpus}." if found.per_node else ""
    if not found.named:
        words += f" The job names no GPU, and nodes have {gpu_names(found.gpus)}: to wait for another, name it in compute.gpu.product."
    raise StageError(Reason.DOES_NOT_FIT, words)


def counts_of(spec: FineTuneJobSpec, several: tuple[Layout, ...], found: Candidates) -> Sequence[int]:
    """How many GPUs of each node to try: those numbers that a node has, or else the first."""
    may_be = gpu_counts(spec, several)
    return [n for n in may_be if found.with_count(n)] or may_be[:1]


def _of_unknown(
    spec: FineTuneJobSpec,
    method: MethodType,
    split: Split,
    request: Request,
    several: tuple[Layout, ...],
    unsuitable: list[Gpu],
    without_bfloat16: list[Gpu],
) -> RunPlan:
    quantized = request.tuning.model_copy(update={"quantized": method is MethodType.QLORA})
    batch = request.batch.model_copy(update={"micro_batch_sequences": split.micro_batch_sequences})
    layout = layouts(request, several)[0]
    planned = plan(request.model_copy(update={"tuning": quantized, "batch": batch, "layout": layout}))
    return RunPlan(
        method=method,
        split=split,
        layout=layout,
        gpus_per_node=request.gpus // spec.compute.nodes,
        unsuitable_gpu_products=[gpu.product for gpu in (*unsuitable, *without_bfloat16)] or None,
        needed_bytes=planned.needed_bytes,
        peak_allocated_bytes=planned.measurable_bytes,
        verified=planned.verified,
        summary=f"needs {gib(planned.needed_bytes)} of GPU memory by plan; whether the GPU has it is not known.{_avoided(unsuitable, without_bfloat16)}",
    )


def _avoided(unsuitable: list[Gpu], without_bfloat16: list[Gpu]) -> str:
    small = f" Not on {gpu_names(unsuitable)}, which nodes have: too little memory for it." if unsuitable else ""
    if not without_bfloat16:
        return small
    return f"{small} Not on {gpu_names(without_bfloat16)}, which nodes have: no bfloat16, which training.computeDtype asks for."


def _chosen(
    spec: FineTuneJobSpec,
    split: Split,
    choice: Choice,
    gpu: Gpu,
    unsuitable: list[Gpu],
    without_bfloat16: list[Gpu],
    fewer: str = "",
) -> RunPlan:
    planned = plan(choice.request, gpu.peak_tflops)
    misfit = "" if choice.fit.fits else f" {ESTIMATED_MISFIT}"
    return RunPlan(
        method=choice.method,
        layout=choice.request.layout,
        gpus_per_node=choice.request.gpus // spec.compute.nodes,
        split=split.model_copy(
            update={
                "micro_batch_sequences": choice.micro_batch_sequences,
                "gradient_accumulation_steps": choice.gradient_accumulation_steps,
                "evaluation_divisor": max(1, EVALUATION_TOKENS // choice.request.evaluation_tokens),
            }
        ),
        gpu=gpu.name,
        unsuitable_gpu_products=[each.product for each in (*unsuitable, *without_bfloat16)] or None,
        needed_bytes=planned.needed_bytes,
        usable_bytes=gpu.usable_bytes,
        peak_allocated_bytes=planned.measurable_bytes,
        estimated_seconds=planned.work.seconds,
        verified=planned.verified,
        summary=f"{plan_sentence(choice.request, planned, gpu)} {choice.reason}{fewer}{misfit}{_avoided(unsuitable, without_bfloat16)}",
    )
