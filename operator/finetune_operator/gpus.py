"""Which kinds of GPU the nodes have that a training pod may land on: by their labels, read when a job is frozen."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterable
from typing import Any

from finetune_api.names import GPU_COUNT_LABEL, GPU_MEMORY_LABEL, GPU_PRODUCT_LABEL, GPU_REPLICAS_LABEL, GPU_RESOURCE
from finetune_api.planner.gpus import UnknownGpu, find_gpu
from finetune_api.quantity import parse_quantity
from finetune_api.snapshot import NodeGpu
from finetune_api.spec import FineTuneJobSpec, Toleration
from finetune_operator.client import NODES_PATH, Api, ApiError, Raw

logger = logging.getLogger(__name__)
FRESH_SECONDS = 60.0
"""Nodes come and go slowly, and a list of them is large."""
FORBIDDEN = 403
SHARED = "-SHARED"
CONDITIONS = "node.kubernetes.io/"
"""Taints of a node's state (cordoned, not ready): they pass, and its GPU stays what it is."""


class NodeGpus:
    """The nodes with GPUs, read at most once a minute, whoever asks."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._nodes: list[Raw] | None = None
        self._unread: ApiError | None = None
        """Why they were never read."""
        self._asked_at: float | None = None
        self._lock = asyncio.Lock()

    async def for_job(self, spec: FineTuneJobSpec) -> list[NodeGpu] | None:
        """What the plan of a job has to hold for; None where nodes may not be read, or need not be.

        Raises:
            ApiError: nodes were never read, and the API server refuses otherwise than for want of rights, or cannot be reached.
        """
        if not needed(spec):
            return None
        nodes = await self.nodes(waited_for=True)
        return kinds(nodes, spec) if nodes is not None else None

    async def nodes(self, *, waited_for: bool = False) -> list[Raw] | None:
        """What is looked at of the nodes with GPUs (see :func:`_trimmed`); None without the right to list them.

        Args:
            waited_for: a job goes on only with them: where an outage kept them from ever being read, they are asked for at once again.

        Raises:
            ApiError: they were never read, and could not be when they were last asked for.
        """
        async with self._lock:
            fresh = self._asked_at is not None and time.monotonic() - self._asked_at <= FRESH_SECONDS
            if not fresh or (waited_for and self._unread is not None):
                await self._ask()
            if self._unread is not None:
                raise self._unread.with_traceback(None)
            return self._nodes

    async def _ask(self) -> None:
        """A refusal is remembered as an answer is: nobody hears of a right sooner than after a minute."""
        unread = None
        try:
            self._nodes, _ = await self._api.list_all(NODES_PATH, GPU_PRODUCT_LABEL, trim=_trimmed)
        except ApiError as problem:
            if problem.status != FORBIDDEN and self._nodes is None:
                problem.message = f"nodes cannot be listed: {problem.message or problem.reason}"
                unread = problem
            else:
                logger.warning("nodes cannot be listed: %s", problem)
            if problem.status == FORBIDDEN:
                self._nodes = None
        self._unread, self._asked_at = unread, time.monotonic()


def needed(spec: FineTuneJobSpec) -> bool:
    """Whether a job leaves it to the cluster what its GPUs can hold, and nodes tell.

    Under Kueue it is the flavors of the queue that say where a pod may land. The labels are those of whole GPUs or, where a node's
    slices are all alike, of these; a resource of another name says what it is by its name.
    """
    if spec.training.use_cpu or spec.queue.name is not None or spec.compute.gpu.resource_name != GPU_RESOURCE:
        return False
    if spec.compute.gpus() is None:
        return True  # its nodes tell how many there may be
    if spec.compute.gpu.memory is not None:
        return False
    if spec.compute.gpu.product is None:
        return True
    try:
        find_gpu(spec.compute.gpu.product)
    except UnknownGpu:
        return True  # its nodes may tell its memory
    return False


def kinds(nodes: Iterable[Raw], spec: FineTuneJobSpec) -> list[NodeGpu]:
    """The kinds on nodes that a job's training pod may land on, in the order of their names."""
    found: dict[str, NodeGpu] = {}
    for node in nodes:
        labels = node["metadata"]["labels"]
        if not may_land(node, spec):
            continue
        product, memory = labels[GPU_PRODUCT_LABEL], _number(labels.get(GPU_MEMORY_LABEL))
        shared = product.endswith(SHARED) or (_number(labels.get(GPU_REPLICAS_LABEL)) or 0) > 1
        known = found.get(product) or NodeGpu(product=product, memory_mib=memory, nodes=0)
        found[product] = NodeGpu(
            product=product,
            memory_mib=min(filter(None, (memory, known.memory_mib)), default=None),
            shared=shared or known.shared,
            nodes=known.nodes + 1,
            per_node=max(gpu_count(node, spec), known.per_node or 0),
        )
    return [found[product] for product in sorted(found)]


def may_land(node: Raw, spec: FineTuneJobSpec) -> bool:
    """Whether a job's training pod may be on a node at all, whoever is there now."""
    labels, gpu = node["metadata"]["labels"], spec.compute.gpu
    wanted = dict(spec.runtime.node_selector or {})
    if gpu.product is not None:
        wanted[GPU_PRODUCT_LABEL] = gpu.product
    return (
        wanted.items() <= labels.items()
        and gpu_count(node, spec) >= (spec.compute.gpus() or 1)
        and all(
            _tolerated(taint, gpu.resource_name, spec.runtime.tolerations or []) for taint in node["spec"]["taints"]
        )
    )


def gpu_count(node: Raw, spec: FineTuneJobSpec) -> int:
    """How many GPUs a node has. What is allocatable is 0 for a moment whenever the device plugin starts anew."""
    label = _number(node["metadata"]["labels"].get(GPU_COUNT_LABEL)) or 0
    return max(allocatable(node, spec.compute.gpu.resource_name), label)


def allocatable(node: Raw, resource: str) -> int:
    """How much of a resource a node offers just now, to all its pods together."""
    return int(parse_quantity(str(node["status"]["allocatable"].get(resource, "0"))))


def closed(node: Raw) -> bool:
    """Whether its state keeps new pods away: cordoned, not ready, short of something."""
    return any(
        str(taint.get("key", "")).startswith(CONDITIONS) and taint.get("effect") != "PreferNoSchedule"
        for taint in node["spec"]["taints"]
    )


def _tolerated(taint: dict[str, Any], resource: str, tolerations: Iterable[Toleration]) -> bool:
    """As the scheduler has it. Pods that ask for a resource often get its toleration at admission (ExtendedResourceToleration)."""
    key = str(taint.get("key", ""))
    if taint.get("effect") == "PreferNoSchedule" or key == resource or key.startswith(CONDITIONS):
        return True
    return any(
        (t.key in (None, key))
        and (t.effect in (None, taint.get("effect")))
        and (t.operator == "Exists" or (t.key is not None and (t.value or "") == (taint.get("value") or "")))
        for t in tolerations
    )


def _number(label: str | None) -> int | None:
    return int(label) if label is not None and label.isdecimal() else None


def _trimmed(node: Raw) -> Raw:
    """What is looked at; a whole node with its images and its state is a hundred times as much."""
    return {
        "metadata": {"name": node["metadata"].get("name", ""), "labels": node["metadata"].get("labels") or {}},
        "spec": {"taints": (node.get("spec") or {}).get("taints") or []},
        "status": {"allocatable": (node.get("status") or {}).get("allocatable") or {}},
    }
