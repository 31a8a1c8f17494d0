"""Whether a plan fits a GPU, and what would fit where it does not."""

from __future__ import annotations

from collections.abc import Iterator

from finetune_api.base import ApiModel
from finetune_api.optimizers import OptimizerName
from finetune_api.planner.distributed import Layout
from finetune_api.planner.gpus import known_gpus
from finetune_api.planner.plan import Decisive, MemoryPlan, Request, plan
from finetune_api.spec import MOST_GPUS_PER_NODE, Full, QuantizationType, Spectrum

MARGIN = 0.05
"""Share of a GPU's usable memory that a plan leaves free: what the accuracy is tested to."""
SHORTEST_TOKENS = 256
FRACTIONS = 6
"""How often the part that Spectrum chooses is halved."""
GPUS_NAMED = 3


class Alternative(ApiModel):
    """A change that makes the run fit. What is absent stays as it was."""

    method: str | None = None
    quantization: str | None = None
    spectrum_fraction: float | None = None
    """Of full weights."""
    sequence_tokens: int | None = None
    micro_batch_sequences: int | None = None
    gradient_checkpointing: bool | None = None
    gpus: int | None = None
    cpu_offload: bool | None = None
    gpu_products: list[str] = []
    needed_bytes: int
    """On one GPU; of products, on the first."""


class Fit(ApiModel):
    """The verdict for one kind of GPU; ``decisive`` is what needs the most."""

    fits: bool
    needed_bytes: int
    usable_bytes: int
    limit_bytes: int
    """Usable memory less the margin."""
    missing_bytes: int
    """How much too little the limit is; 0 where it fits."""
    decisive: Decisive
    alternatives: list[Alternative] = []
    """What would fit, the smallest change first; empty where it fits."""


def limit(usable_bytes: int) -> int:
    """Usable memory less the margin."""
    return int(usable_bytes * (1 - MARGIN))


def fit(request: Request, planned: MemoryPlan, usable_bytes: int) -> Fit:
    """Judge a plan, and where it does not fit look for what would."""
    bound = limit(usable_bytes)
    fits = planned.needed_bytes <= bound
    return Fit(
        fits=fits,
        needed_bytes=planned.needed_bytes,
        usable_bytes=usable_bytes,
        limit_bytes=bound,
        missing_bytes=max(0, planned.needed_bytes - bound),
        decisive=planned.decisive,
        alternatives=[] if fits else list(alternatives(request, planned, bound)),
    )


def alternatives(request: Request, planned: MemoryPlan, bound: int) -> Iterator[Alternative]:
    """Single changes, then QLoRA with a shorter row, then more GPUs, then other GPUs, and at last the slow way."""

    def needed(changed: Request) -> int:
        return plan(changed).needed_bytes

    if not request.batch.gradient_checkpointing:
        size = needed(with_batch(request, gradient_checkpointing=True))
        if size <= bound:
            yield Alternative(gradient_checkpointing=True, needed_bytes=size)
    for rows in smaller(request.batch.micro_batch_sequences, 1):
        size = needed(with_batch(request, micro_batch_sequences=rows))
        if size <= bound:
            yield Alternative(micro_batch_sequences=rows, needed_bytes=size)
            break
    if request.tuning.full:
        yield from fewer_weights(request, bound)
    lean = with_batch(quantized(request), micro_batch_sequences=1, gradient_checkpointing=True)
    if not request.tuning.quantized:
        size = needed(quantized(request))
        if size <= bound:
            yield Alternative(method="QLoRA", needed_bytes=size)
    if request.tuning.quantized and request.tuning.eight_bit:
        size = needed(in_4_bit(request))
        if size <= bound:
            yield Alternative(quantization=QuantizationType.NF4, needed_bytes=size)
    if needed(lean) > bound or request.tuning.quantized:
        yield from shorter(request, lean, bound)
    yield from more_gpus(request, lean, bound)
    products = [gpu.product for gpu in known_gpus() if planned.needed_bytes <= limit(gpu.usable_bytes)]
    if products:
        yield Alternative(gpu_products=products[:GPUS_NAMED], needed_bytes=planned.needed_bytes)
    if request.layout is not Layout.CPU_OFFLOAD:
        for candidate, changes in shareable(request, lean):
            size = needed(candidate.model_copy(update={"layout": Layout.CPU_OFFLOAD}))
            if size <= bound:
                yield Alternative(**changes, cpu_offload=True, needed_bytes=size)
                return


def fewer_weights(request: Request, bound: int) -> Iterator[Alternative]:
    """Instead of full weights: the largest part that Spectrum may choose, halving, or an adapter."""
    tuning = request.tuning
    part = 1.0 if tuning.full is None or tuning.full.spectrum is None else tuning.full.spectrum.fraction
    for fraction in (part / 2**n for n in range(1, FRACTIONS + 1)):
        fewer = tuning.model_copy(update={"full": Full(spectrum=Spectrum(fraction=fraction))})
        size = plan(request.model_copy(update={"tuning": fewer})).needed_bytes
        if size <= bound:
            yield Alternative(spectrum_fraction=fraction, needed_bytes=size)
            break
    size = plan(adapted(request)).needed_bytes
    if size <= bound:
        yield Alternative(method="LoRA", needed_bytes=size)


def shorter(request: Request, lean: Request, bound: int) -> Iterator[Alternative]:
    """The longest row, halving, with which the leanest settings fit."""
    for tokens in smaller(request.batch.sequence_tokens, SHORTEST_TOKENS):
        size = plan(with_batch(lean, sequence_tokens=tokens)).needed_bytes
        if size <= bound:
            yield Alternative(
                method=None if request.tuning.quantized else "QLoRA",
                sequence_tokens=tokens,
                micro_batch_sequences=None if request.batch.micro_batch_sequences == 1 else 1,
                needed_bytes=size,
            )
            return


def more_gpus(request: Request, lean: Request, bound: int) -> Iterator[Alternative]:
    """The fewest GPUs of the same kind over which the run fits when it is sharded, as it is or as QLoRA."""
    for candidate, changes in shareable(request, lean):
        for count in range(request.gpus + 1, MOST_GPUS_PER_NODE + 1):
            size = plan(candidate.model_copy(update={"layout": Layout.FSDP, "gpus": count})).needed_bytes
            if size <= bound:
                yield Alternative(**changes, gpus=count, needed_bytes=size)
                return


def shareable(request: Request, lean: Request) -> list[tuple[Request, dict[str, str]]]:
    """What GPUs can share out, or host memory hold: the run as far as it is and its leanest, each with what that changes. Full weights and a base
    in 8 bit are whole on each GPU."""
    tuning = request.tuning
    first: tuple[Request, dict[str, str]] = (request, {})
    if tuning.full:
        first = (adapted(request), {"method": "LoRA"})
    elif tuning.quantized and tuning.eight_bit:
        first = (in_4_bit(request), {"quantization": QuantizationType.NF4})
    changes = {} if tuning.quantized else {"method": "QLoRA"}
    if tuning.eight_bit:
        changes["quantization"] = QuantizationType.NF4
    return [first, (in_4_bit(lean) if tuning.eight_bit else lean, changes)]


def smaller(value: int, least: int) -> Iterator[int]:
    """Halves, down to ``least``."""
    while value // 2 >= least:
        value //= 2
        yield value


def adapted(request: Request) -> Request:
    """The same with an adapter instead of full weights."""
    tuning = request.tuning.model_copy(update={"full": None, "galore_rank": None})
    optimizer = OptimizerName.ADAMW_TORCH_FUSED if request.tuning.galore_rank else request.optimizer
    return request.model_copy(update={"tuning": tuning, "optimizer": optimizer})


def quantized(request: Request) -> Request:
    """The same by QLoRA."""
    request = adapted(request)
    return request.model_copy(update={"tuning": request.tuning.model_copy(update={"quantized": True})})


def in_4_bit(request: Request) -> Request:
    """The same with another type of quantization."""
    tuning = request.tuning.model_copy(update={"quantization": QuantizationType.NF4})
    return request.model_copy(update={"tuning": tuning})


def with_batch(request: Request, **changes: int | bool) -> Request:
    """The same with another batch."""
    return request.model_copy(update={"batch": request.batch.model_copy(update=changes)})
