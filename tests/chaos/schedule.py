"""Which kills a run gets, and when: a pure function of a seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import StrEnum


class Kind(StrEnum):
    """What is killed, and how."""

    DELETE = "pod deleted"
    """With its grace period: SIGTERM."""
    EVICT = "pod evicted"
    """By the Eviction API, as a node is drained."""
    FORCE = "pod force-deleted"
    """``--grace-period=0 --force``: the object is gone before its processes are."""
    CONTAINER = "container killed"
    """SIGKILL of the container's first process."""
    WORKER = "training process killed"
    """SIGKILL of the process that trains; the supervisor lives on."""
    OPERATOR = "operator pod"
    STORE = "S3 server"
    API_SERVER = "apiserver"


POD_LOSSES = (Kind.DELETE, Kind.EVICT, Kind.FORCE, Kind.CONTAINER)
"""After each the Job controller waits 10, 20, 40 … seconds before it replaces a Job's next pod."""
INTERRUPTING = (*POD_LOSSES, Kind.WORKER)
TRAINING_IS_SPARED = (Kind.OPERATOR, Kind.STORE, Kind.API_SERVER)


class Moment(StrEnum):
    """Moments outside of training past the first checkpoint: when a stage's pod writes its first line."""

    PREPARING = "prepare"
    LOADING = "train"
    PUBLISHING = "publish"


@dataclass(frozen=True)
class Kill:
    """One kill."""

    kind: Kind
    at: Moment | int
    """At a moment, or when training has made this step."""


FIRST, LAST = 0.08, 0.88
"""Part of training in which kills fall: what they cost is measured before training ends."""


def schedule(seed: int, steps: int, kills: int = 10) -> list[Kill]:
    """So many kills in the order of a job's life: each kind once while it trains (an eviction is a deletion to the pod), what is left
    over at random.

    Two of ten fall outside of training. Pod losses of the training Job are three, or four with one as its pod starts.
    """
    rng = random.Random(seed)
    outside = min(kills // 5, len(Moment))
    kinds = [kind for kind in Kind if kind is not Kind.EVICT]
    rng.shuffle(kinds)
    while len(kinds) < kills - outside:
        kinds.append(rng.choice((Kind.WORKER, *TRAINING_IS_SPARED)))
    kinds = kinds[: kills - outside]
    rng.shuffle(kinds)
    width = steps * (LAST - FIRST) / len(kinds)
    in_training = [
        Kill(kind, max(2, round(steps * FIRST + width * (i + rng.uniform(0.1, 0.9))))) for i, kind in enumerate(kinds)
    ]
    moments = rng.sample(list(Moment), outside)
    elsewhere = [Kill(rng.choice((Kind.FORCE, Kind.CONTAINER, Kind.OPERATOR)), moment) for moment in moments]
    order = [Moment.PREPARING, Moment.LOADING, None, Moment.PUBLISHING]
    return sorted(
        [*elsewhere, *in_training],
        key=lambda k: (order.index(k.at if isinstance(k.at, Moment) else None), k.at if isinstance(k.at, int) else 0),
    )
