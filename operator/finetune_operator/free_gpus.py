"""How many GPUs are free: what nodes offer, minus what the pods on them ask for that have not ended.

It costs a list of all pods that are bound to nodes, and the right to read them in all namespaces. So it is asked for only where a plan
or a waiting pod has a use for it (:func:`finetune_operator.planning.stock.stock_wanted`), at most once a minute for all jobs
together, and of each pod two numbers are kept.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from finetune_api.names import GPU_PRODUCT_LABEL, GPU_RESOURCE
from finetune_api.quantity import parse_quantity
from finetune_api.spec import FineTuneJobSpec
from finetune_api.status import GpuStock
from finetune_operator.client import Api, ApiError, Raw, pods_path
from finetune_operator.gpus import FORBIDDEN, FRESH_SECONDS, NodeGpus, allocatable, closed, gpu_count, may_land

logger = logging.getLogger(__name__)
BOUND = "spec.nodeName!=,status.phase!=Succeeded,status.phase!=Failed"
"""Field selector of the pods that hold what they ask for."""


class FreeGpus:
    """The GPUs that pods ask for, by node, read at most once a minute, whoever asks."""

    def __init__(self, api: Api, nodes: NodeGpus, allowed: bool) -> None:
        self._api = api
        self._nodes = nodes
        self._allowed = allowed
        self._asked: Mapping[str, int] | None = None
        self._read_at: float | None = None
        self._lock = asyncio.Lock()

    async def for_job(self, spec: FineTuneJobSpec) -> tuple[GpuStock, ...] | None:
        """The kinds that a job's training pod may land on, and how many of each are free, if that may be known; None where nodes tell
        nothing. It is a hint for people: no error stops a job."""
        try:
            nodes = await self._nodes.nodes()
        except ApiError as problem:
            logger.info("which GPUs are free is not told: %s", problem)
            return None
        return None if nodes is None else stock(nodes, await self._fresh() if self._allowed else None, spec)

    async def _fresh(self) -> Mapping[str, int] | None:
        async with self._lock:
            if self._read_at is None or time.monotonic() - self._read_at > FRESH_SECONDS:
                try:
                    pods, _ = await self._api.list_all(pods_path(None), trim=_trimmed, field_selector=BOUND)
                    self._asked = asked_by_node(pods)
                except ApiError as problem:
                    logger.warning("which GPUs are free is not known: pods cannot be listed: %s", problem)
                    if problem.status == FORBIDDEN:
                        self._asked = None
                # Also after a refusal: nobody hears of a right sooner than after a minute.
                self._read_at = time.monotonic()
            return self._asked


def stock(nodes: Iterable[Raw], asked: Mapping[str, int] | None, spec: FineTuneJobSpec) -> tuple[GpuStock, ...]:
    """By product, in the order of their names.

    Args:
        asked: GPUs that pods ask for, by node; None where that is not known.
    """
    there: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for node in nodes:
        if may_land(node, spec):
            offered = 0 if closed(node) else allocatable(node, GPU_RESOURCE)
            free = max(0, offered - (asked or {}).get(node["metadata"]["name"], 0))
            there[node["metadata"]["labels"][GPU_PRODUCT_LABEL]].append((gpu_count(node, spec), free))
    return tuple(
        GpuStock(
            product=product,
            nodes=len(found),
            total=sum(total for total, _ in found),
            most_per_node=max(total for total, _ in found),
            free=sum(free for _, free in found) if asked is not None else None,
            most_free_on_a_node=max(free for _, free in found) if asked is not None else None,
        )
        for product, found in sorted(there.items())
    )


def asked_by_node(pods: Iterable[Raw]) -> Mapping[str, int]:
    """GPUs that trimmed pods ask for, by node."""
    asked: Counter[str] = Counter()
    for pod in pods:
        asked[pod["node"]] += pod["gpus"]
    return asked


def gpus_of(pod_spec: Raw) -> int:
    """What the scheduler counts for a pod: its containers and sidecars together, or an init container with the sidecars before it,
    where that is more (KEP-753)."""
    sidecars, most = 0, 0
    for container in pod_spec.get("initContainers") or []:
        if container.get("restartPolicy") == "Always":
            sidecars += _request(container)
        else:
            most = max(most, sidecars + _request(container))
    return max(most, sidecars + sum(_request(c) for c in pod_spec.get("containers") or []))


def _request(container: Raw) -> int:
    # Of an extended resource request and limit are the same, and the API server fills the request in.
    requests = (container.get("resources") or {}).get("requests") or {}
    return int(parse_quantity(str(requests.get(GPU_RESOURCE, "0"))))


def _trimmed(pod: Raw) -> Raw:
    spec = pod.get("spec") or {}
    return {"node": spec.get("nodeName") or "", "gpus": gpus_of(spec)}
