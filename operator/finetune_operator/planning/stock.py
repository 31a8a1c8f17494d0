"""What of the GPUs that a run may use is free: told in status, for people. It decides nothing.

The plan is made of the snapshot alone, so that it comes out the same whenever prepare runs again, and every kind of GPU that it fits
stays open to the training pod: the scheduler takes one that is free.
"""

from __future__ import annotations

from collections.abc import Sequence

from finetune_api.names import GPU_RESOURCE, Stage
from finetune_api.status import ConditionType, GpuStock, PlanStatus
from finetune_operator.planning.clock import rfc3339
from finetune_operator.planning.conditions import is_true
from finetune_operator.planning.model import Observation

MAX_KINDS = 16


def stock_wanted(obs: Observation) -> bool:
    """Whether to look at what is free: a training pod finds no place, or a plan that leaves a choice was made and nobody looked yet.

    Cheap: it is asked at every look. Under Kueue it is the queue that says what is free.
    """
    spec, status = obs.job.spec, obs.job.status
    if spec is None or obs.job.deleting or is_true(status, ConditionType.FINISHED):
        return False
    if spec.training.use_cpu or spec.queue.name is not None or spec.compute.gpu.resource_name != GPU_RESOURCE:
        return False
    train = [p for p in obs.pods if p.stage is Stage.TRAIN and not p.ended]
    if any(p.unschedulable for p in train):
        return True
    made = spec.plan_only or (status.plan is not None and status.plan.total_steps is not None)
    told = status.plan is not None and status.plan.gpu_stock is not None
    prepared = any(j.stage is Stage.PREPARE and j.complete_at is not None for j in obs.jobs)
    return made and prepared and not told and not any(p.node for p in train) and _choice(obs)


def _choice(obs: Observation) -> bool:
    """Whether the job leaves it to the cluster what it runs on."""
    spec, record = obs.job.spec, obs.snapshot
    kinds = record.snapshot.node_gpus if record is not None else None
    return (spec is not None and spec.compute.gpus() is None) or len(kinds or []) > 1


def suitable(stock: Sequence[GpuStock], plan: PlanStatus) -> list[GpuStock]:
    """The kinds that the run fits on: large enough, and with as many on one node as each of its pods takes."""
    avoided = plan.unsuitable_gpu_products or []
    return [s for s in stock if s.product not in avoided and s.most_per_node >= (plan.gpus_per_node or 1)]


def with_stock(plan: PlanStatus, old: PlanStatus | None, obs: Observation) -> PlanStatus:
    """The plan and what is free of the kinds that it fits; what was told stays as long as it is so, with its time."""
    kinds = suitable(obs.stock, plan)[:MAX_KINDS] if obs.stock is not None else None
    before = (old.gpu_stock, old.availability) if old is not None else (None, None)
    if kinds is None or kinds == before[0] or obs.job.spec is None:
        return plan.model_copy(update={"gpu_stock": before[0], "availability": before[1]})
    pods, each = obs.job.spec.compute.nodes, plan.gpus_per_node or 0
    takes = f"{each} on {'each of ' if pods > 1 else ''}{pods} {'node' if pods == 1 else 'nodes'}"
    words = f"Takes {takes}. At {rfc3339(obs.now)} {free_words(kinds)}."
    return plan.model_copy(update={"gpu_stock": kinds, "availability": words})


def free_words(stock: Sequence[GpuStock]) -> str:
    """``free: 3 of 8 NVIDIA-A10G (at most 2 on one node), 0 of 4 Tesla-T4``; nothing about what is not known but that."""
    if not stock:
        return "no node has GPUs that it may use"
    if any(s.free is None for s in stock):
        return f"free: unknown of {', '.join(f'{s.total} {s.product}' for s in stock)}"
    return f"free: {', '.join(_of_kind(s) for s in stock)}"


def _of_kind(kind: GpuStock) -> str:
    where = f" (at most {kind.most_free_on_a_node} on one node)" if kind.nodes > 1 and kind.free else ""
    return f"{kind.free} of {kind.total} {kind.product}{where}"
