"""The method and the micro-batch, where the user leaves them to us."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from finetune_api.base import ApiModel
from finetune_api.planner.distributed import Layout
from finetune_api.planner.fit import Fit, fit, limit, quantized, with_batch
from finetune_api.planner.gpus import Gpu
from finetune_api.planner.plan import MemoryPlan, Request, plan
from finetune_api.planner.sentences import gib
from finetune_api.snapshot import rank_share
from finetune_api.spec import MethodType

SEVERAL = (Layout.DDP, Layout.FSDP)
"""Whole copies first: they are faster."""
EFFICIENT_TOKENS = 8192
"""Tokens of a micro-batch beyond which a GPU is taken to get no faster: an assumption, not measured on one. A product of *T* tokens with a large
weight in 16 bit is about *T* operations for each byte that it moves, and a GPU is held up by its operations rather than by its memory above the
ratio of the two (roofline model, Williams et al. 2009; NVIDIA's data sheets): 295 for an H100 SXM, 153 for an A100 80GB. That so much more is allowed
is for what is launched, the adapters' small products, and whole waves of tiles."""


class Choice(ApiModel):
    """What was chosen, and why."""

    request: Request
    planned: MemoryPlan
    fit: Fit
    method: MethodType
    micro_batch_sequences: int
    gradient_accumulation_steps: int
    """Micro-batches of a step, on each GPU."""
    reason: str


def choose(
    request: Request,
    usable_bytes: int,
    global_batch_sequences: int,
    method: MethodType | None = None,
    micro_batch_sequences: int | None = None,
    *,
    evaluation_follows: bool = False,
    several: Sequence[Layout] = SEVERAL,
) -> Choice:
    """LoRA if it fits, QLoRA if not, each with the largest efficient micro-batch that fits. Where nothing fits, the choice is
    QLoRA (or the method asked for) with the smallest micro-batch, and its ``fit`` says what would.

    Args:
        request: all that is settled; its tuning's ``quantized`` and its micro-batch are chosen here.
        method: chosen when absent.
        micro_batch_sequences: the most the user allows; chosen when absent.
        evaluation_follows: the trainer takes the evaluation batch from the plan, so it is made as small as training allows.
        several: what several GPUs may do, the first that fits is taken.
    """
    share = rank_share(global_batch_sequences, request.gpus)
    methods = [method] if method else [MethodType.LORA, MethodType.QLORA]
    rejected: list[str] = []
    last: tuple[MethodType, Request, MemoryPlan] | None = None
    for candidate in methods:
        base = quantized(request) if candidate is MethodType.QLORA else request
        for layout in layouts(request, several):
            for rows in micro_batches(share, request.batch.sequence_tokens, micro_batch_sequences):
                tried = with_batch(base.model_copy(update={"layout": layout}), micro_batch_sequences=rows)
                planned = plan(tried)
                if evaluation_follows:
                    tried = tried.model_copy(update={"evaluation_tokens": evaluation_tokens(tried, planned)})
                    planned = plan(tried)
                last = candidate, tried, planned
                if planned.needed_bytes <= limit(usable_bytes):
                    reason = _reason(candidate, rows, method is None, planned, usable_bytes, rejected)
                    return _choice(candidate, tried, planned, usable_bytes, share, reason)
        assert last is not None
        rejected.append(
            f"{candidate} would need {gib(last[2].needed_bytes)}: does not fit with the 5 % margin ({gib(limit(usable_bytes))})."
        )
    assert last is not None
    return _choice(*last, usable_bytes, share, " ".join(rejected))


def choose_among(
    request: Request,
    gpus: Sequence[Gpu],
    global_batch_sequences: int,
    method: MethodType | None = None,
    micro_batch_sequences: int | None = None,
    *,
    evaluation_follows: bool = False,
    several: Sequence[Layout] = SEVERAL,
) -> tuple[Choice, list[Gpu]]:
    """One plan for whichever of several kinds of GPU the run will get: LoRA if it fits any of them, QLoRA if not, cut for the smallest
    that the method fits.

    Args:
        gpus: at least one.

    Returns:
        The choice, and the kinds of GPU that it holds for, the smallest memory first. Where nothing fits, that is the largest.
    """
    ordered = sorted(gpus, key=lambda gpu: gpu.usable_bytes)
    choices = [
        choose(
            request,
            gpu.usable_bytes,
            global_batch_sequences,
            method,
            micro_batch_sequences,
            evaluation_follows=evaluation_follows,
            several=several,
        )
        for gpu in ordered
    ]
    fitting = [n for n, choice in enumerate(choices) if choice.fit.fits]
    first = min(fitting, key=lambda n: (choices[n].method is not MethodType.LORA, n), default=len(ordered) - 1)
    return choices[first], ordered[first:]


def layouts(request: Request, several: Sequence[Layout] = SEVERAL) -> list[Layout]:
    """One GPU alone; several each with a whole copy if that fits, which is fastest, sharded if not. Offloading is for any number."""
    return [Layout.SINGLE] if request.gpus == 1 and Layout.CPU_OFFLOAD not in several else list(several)


def micro_batches(share: int, sequence_tokens: int, most: int | None) -> Iterator[int]:
    """Divisors of a GPU's share of the global batch, largest first, up to what is efficient or the user allows."""
    bound = most if most is not None else max(1, EFFICIENT_TOKENS // sequence_tokens)
    yield from (rows for rows in range(min(share, bound), 0, -1) if share % rows == 0)


def evaluation_tokens(request: Request, planned: MemoryPlan) -> int:
    """The largest evaluation batch, halving from the default, that needs no more memory than training does."""
    tokens = request.evaluation_tokens
    while tokens // 2 >= request.batch.sequence_tokens and planned.peak_evaluation_bytes > planned.peak_allocated_bytes:
        smaller = plan(request.model_copy(update={"evaluation_tokens": tokens // 2}))
        if smaller.peak_evaluation_bytes == planned.peak_evaluation_bytes:
            break  # answers to prompts decide
        tokens, planned = tokens // 2, smaller
    return tokens


def _choice(
    method: MethodType, request: Request, planned: MemoryPlan, usable_bytes: int, share: int, reason: str
) -> Choice:
    rows = request.batch.micro_batch_sequences
    return Choice(
        request=request,
        planned=planned,
        fit=fit(request, planned, usable_bytes),
        method=method,
        micro_batch_sequences=rows,
        gradient_accumulation_steps=share // rows,
        reason=reason,
    )


def _reason(
    method: MethodType, rows: int, chosen: bool, planned: MemoryPlan, usable_bytes: int, rejected: list[str]
) -> str:
    why = "as asked for" if not chosen else ("it fits, and computes in full 16 bit" if not rejected else "it fits")
    used = f"{gib(planned.needed_bytes)} of {gib(usable_bytes)}"
    return " ".join([f"{method} ({why}): {used}, micro-batch {rows}.", *rejected])
