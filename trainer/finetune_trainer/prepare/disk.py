"""Whether the training pod is likely to have room for the base model, before it holds a GPU."""

from __future__ import annotations

from finetune_api.quantity import parse_quantity
from finetune_api.spec import FineTuneJobSpec
from finetune_api.uris import PvcLocation, parse_uri
from finetune_trainer.memory import gibibytes

LARGE_BYTES = 20 << 30
"""Of smaller models nodes have room for (a 7B in 16 bit is 14 GiB); the kubelet evicts from 10 to 15 % of free disk on."""


def disk_warnings(spec: FineTuneJobSpec, model_bytes: int) -> list[str]:
    """A warning where the base lands on a pod's disk and its request does not say so, or too little: then it may start on a node without
    room, which only shows (``DiskFull``, or an eviction) while it holds a GPU."""
    if spec.model.cache is not None or isinstance(parse_uri(spec.model.uri), PvcLocation):
        return []
    asked = spec.compute.ephemeral_storage
    if asked is None:
        if model_bytes < LARGE_BYTES:
            return []
        found = "asks for none: set compute.ephemeralStorage"
    else:
        if int(parse_quantity(asked)) >= model_bytes:
            return []
        found = f"asks for {asked}: raise compute.ephemeralStorage"
    return [
        f"the base model takes {gibibytes(model_bytes)} of the training pod's disk, which {found}, about twice that for a merged model too, so that it gets "
        "a node with room; or keep the base in model.cache"
    ]
