"""Where a training pod stands among those that train together: pure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from finetune_api.names import ENV_ENDPOINT, ENV_GPUS_PER_NODE, ENV_LEADER, ENV_NODE_INDEX
from finetune_api.snapshot import ranks_per_node
from finetune_api.spec import FineTuneJobSpec

ENV_LOG_LEVEL = "FINETUNE_LOG_LEVEL"
ENV_RANK = "FINETUNE_RANK"
ENV_RANKS = "FINETUNE_RANKS"
ENV_RANKS_PER_NODE = "FINETUNE_RANKS_PER_NODE"
ENV_RENDEZVOUS = "FINETUNE_RENDEZVOUS"
"""Where ranks meet, as torch.distributed's ``init_method``."""


@dataclass(frozen=True)
class Place:
    """This pod, and how many others there are."""

    nodes: int
    index: int
    """From 0; the first one leads."""
    per_node: int
    """Ranks of each pod: one per GPU."""
    host: str = ""
    """The first pod's, by the headless Service."""
    port: int = 0

    @property
    def ranks(self) -> int:
        """Of all pods together."""
        return self.nodes * self.per_node


def place_of(spec: FineTuneJobSpec, environ: Mapping[str, str] = os.environ) -> Place:
    """As the pod's template says; the Job controller tells each pod its index (completionMode Indexed)."""
    # What the pod has, as Auto may have become any number.
    per_node = max(1, int(environ.get(ENV_GPUS_PER_NODE) or ranks_per_node(spec)))
    nodes = spec.compute.nodes
    if nodes == 1:
        return Place(1, 0, per_node)
    host, _, port = environ[ENV_LEADER].rpartition(":")
    return Place(nodes, int(environ[ENV_NODE_INDEX]), per_node, host, int(port))


def rank_environs(environ: Mapping[str, str], place: Place, rendezvous: str) -> list[dict[str, str]]:
    """The environment of each rank of this pod: its number, where it meets the others, and its own GPU of those that the pod sees.

    Only the first one of all talks to the operator. On a CPU they share the threads.
    """
    if place.ranks == 1:
        return [dict(environ)]
    count = place.per_node
    visible = environ.get("CUDA_VISIBLE_DEVICES", ",".join(str(i) for i in range(count))).split(",")
    threads = max(1, len(os.sched_getaffinity(0)) // count)
    environs = []
    for local in range(count):
        rank = place.index * count + local
        own = {
            "OMP_NUM_THREADS": str(threads),
            **environ,
            ENV_RANK: str(rank),
            ENV_RANKS: str(place.ranks),
            ENV_RANKS_PER_NODE: str(count),
            ENV_RENDEZVOUS: rendezvous,
            "CUDA_VISIBLE_DEVICES": visible[local] if local < len(visible) else "",
        }
        if rank:
            own.pop(ENV_ENDPOINT, None)
            own[ENV_LOG_LEVEL] = "WARNING"
        environs.append(own)
    return environs
