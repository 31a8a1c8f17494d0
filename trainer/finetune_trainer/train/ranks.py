"""The processes that train together, one per GPU, on one node or several. Every rank holds the whole adapter; what is shared are gradients, flags,
random states and, with FSDP, the frozen base (sharded.py).

Why not DistributedDataParallel: the loss calls decoder and head apart (see loss.py), past the forward pass that DDP has to see to
synchronise gradients. Only the adapter has gradients, so adding them up once a step, in one message, costs little.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]

from finetune_trainer.supervisor.place import ENV_RANK, ENV_RANKS, ENV_RANKS_PER_NODE, ENV_RENDEZVOUS

PATIENCE = timedelta(hours=24)
"""Ranks wait for the first one while it evaluates or downloads; whether anything hangs is the supervisor's to judge."""
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among the others. Every method but ``first`` is collective: all ranks must call it."""

    rank: int = 0
    size: int = 1
    data: distributed.ProcessGroup | None = None
    """For tensors on the device; the default group is for the CPU."""

    node: distributed.ProcessGroup | None = None
    """Those of this node, where there are several nodes."""
    per_node: int = 1
    sharded: bool = False
    """The base comes a layer at a time (sharded.py): nobody can compute without the others."""
    offloaded: bool = False
    """It comes from host memory."""

    @property
    def first(self) -> bool:
        """Reports and saves, and evaluates where it can do so alone."""
        return self.rank == 0

    @property
    def computes(self) -> bool:
        """Whether this one takes part in an evaluation."""
        return self.first or self.sharded

    def any(self, flag: bool) -> bool:
        """Whether one of them says so."""
        return self.total(int(flag)) > 0

    def agreed(self, flag: bool) -> bool:
        """Whether all of them say so."""
        return self.total(int(flag)) == self.size

    def total(self, value: float) -> float:
        """The sum."""
        if self.size == 1:
            return value
        tensor = torch.tensor(value, dtype=torch.float64)
        distributed.all_reduce(tensor)
        return float(tensor)

    def share(self, make: Callable[[], T]) -> T:
        """What the first one makes, for all (picklable). The others wait."""
        if self.size == 1:
            return make()
        box: list[Any] = [make() if self.first else None]
        distributed.broadcast_object_list(box, src=0)
        shared: T = box[0]
        return shared

    def on_node(self, make: Callable[[], T]) -> T:
        """What the first one of each node makes, for the others of that node: what lies on a node's own disk."""
        if self.node is None:
            return self.share(make)
        first = self.rank - self.rank % self.per_node
        box: list[Any] = [make() if self.rank == first else None]
        distributed.broadcast_object_list(box, src=first, group=self.node)
        made: T = box[0]
        return made

    def together(self, make: Callable[[], T]) -> T:
        """What the model makes, for all: all compute it where the base is shared out, else the first one alone."""
        if not self.sharded:
            return self.share(make)
        own = make()
        return self.share(lambda: own)

    def as_first_has(self, tensor: torch.Tensor) -> torch.Tensor:
        """The first one's values, on all: the last bits may differ, and what follows must not."""
        if self.size > 1:
            distributed.broadcast(tensor, src=0, group=self.data)
        return tensor

    def gather(self, value: T) -> list[T]:
        """Everybody's, by rank; on the first one only, elsewhere empty."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        distributed.gather_object(value, box if self.first else None, dst=0)
        return box if self.first else []

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by the sum over the ranks. A rank whose rows left none adds zeros."""
        if self.size == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in trained])
        distributed.all_reduce(flat, group=self.data)
        for parameter, part in zip(trained, torch.split(flat, [p.numel() for p in trained]), strict=True):
            if parameter.grad is None:
                parameter.grad = part.view_as(parameter).clone()
            else:  # in its place: an embedding that is trained whole has gigabytes of them, and the plan has room for no third copy
                parameter.grad.copy_(part.view_as(parameter))


def join(use_cpu: bool, environ: Mapping[str, str] = os.environ) -> Ranks:
    """Meet the other ranks that the supervisor has started; alone where it has started none."""
    size = int(environ.get(ENV_RANKS) or 1)
    if size == 1:
        return Ranks()
    rank = int(environ[ENV_RANK])
    distributed.init_process_group(
        "gloo", init_method=environ[ENV_RENDEZVOUS], rank=rank, world_size=size, timeout=PATIENCE
    )
    data = (
        distributed.new_group(backend="nccl", timeout=PATIENCE) if torch.cuda.is_available() and not use_cpu else None
    )
    assert data is None or isinstance(data, distributed.ProcessGroup)  # a number would mean: not a member
    per_node = int(environ[ENV_RANKS_PER_NODE])
    node = None
    if per_node < size:
        node, _ = distributed.new_subgroups(per_node, backend="gloo", timeout=PATIENCE)
    return Ranks(rank, size, data, node, per_node)


def alone() -> distributed.ProcessGroup:
    """A group of this process only, for what needs a group."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    assert distributed.group.WORLD is not None
    return distributed.group.WORLD


def leave() -> None:
    """Training is over; the first rank goes on alone."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
