"""How many answers a run generates: as many as asked for, but where each token costs a pass of the whole base between GPUs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from finetune_api.base import ApiModel
from finetune_api.planner import Layout
from finetune_api.results import RunPlan
from finetune_api.spec import CpuOffload, FineTuneJobSpec, Parallelism

GATHERED_PROMPTS = 8
GATHERED_NEW_TOKENS = 64
"""Where the base is gathered for each token: a 70B in 4 bit takes about a second a token between GPUs or from host memory, and two models
answer."""


class AnswerLimits(ApiModel):
    """How many prompts are answered, and with how many tokens at most."""

    prompts: int
    new_tokens: int


def is_sharded(spec: FineTuneJobSpec, plan: RunPlan | None) -> bool:
    """Whether the ranks share the base out: by plan, or where nothing was planned because the spec says so."""
    return plan.layout is Layout.FSDP if plan is not None else spec.training.parallelism is Parallelism.FSDP


def is_offloaded(spec: FineTuneJobSpec, plan: RunPlan | None) -> bool:
    """Whether the base, or a rank's part of it, lies in host memory, decided likewise."""
    return plan.layout is Layout.CPU_OFFLOAD if plan is not None else spec.training.cpu_offload is CpuOffload.ALWAYS


def answer_limits(spec: FineTuneJobSpec, *, gathered: bool) -> AnswerLimits:
    """What is answered.

    Args:
        gathered: whether no device holds the whole base.
    """
    asked = spec.evaluation.generation
    if not gathered:
        return AnswerLimits(prompts=asked.prompts, new_tokens=asked.max_new_tokens)
    return AnswerLimits(
        prompts=min(asked.prompts, GATHERED_PROMPTS), new_tokens=min(asked.max_new_tokens, GATHERED_NEW_TOKENS)
    )


def prompt_room(positions: int | None, max_new_tokens: int, context_tokens: int | None) -> int:
    """Tokens of a prompt that fit the model's positions together with the answer, and ``context_tokens``; at least one."""
    limits = [context_tokens, positions - max_new_tokens if positions else None]
    return max(1, min((limit for limit in limits if limit is not None), default=sys.maxsize))


def positions_of(config: Mapping[str, Any]) -> int | None:
    """The positions that a model has by its config.json, where that says so; GPT-2 has a name of its own for them."""
    text = config.get("text_config")
    values = {**config, **text} if isinstance(text, Mapping) else config
    names = ("max_position_embeddings", "n_positions")
    return next((values[name] for name in names if isinstance(values.get(name), int)), None)


def is_gathered(spec: FineTuneJobSpec, plan: RunPlan | None) -> bool:
    """Whether no GPU holds the whole base, so that each token of an answer gathers it."""
    return is_sharded(spec, plan) or is_offloaded(spec, plan)


def capped(spec: FineTuneJobSpec, plan: RunPlan | None) -> list[str]:
    """A warning where less is answered than asked for."""
    asked = spec.evaluation.generation
    limits = answer_limits(spec, gathered=is_gathered(spec, plan))
    if not asked.prompts or (limits.prompts, limits.new_tokens) == (asked.prompts, asked.max_new_tokens):
        return []
    return [
        f"no GPU holds the whole base, and each token of an answer gathers it: {limits.prompts} of {asked.prompts} prompts are answered, with "
        f"at most {limits.new_tokens} of {asked.max_new_tokens} tokens; for more, ask the result with an inference server"
    ]
