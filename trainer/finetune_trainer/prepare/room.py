"""Whether the pods of later stages are likely to have room for the base model, before one of them holds a GPU."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping

from finetune_api.quantity import parse_quantity
from finetune_api.spec import FineTuneJobSpec
from finetune_api.uris import PvcLocation, parse_uri
from finetune_trainer.memory import gibibytes

LARGE_BYTES = 20 << 30
"""Of smaller models nodes have room for (a 7B in 16 bit is 14 GiB); the kubelet evicts from 10 to 15 % of free disk on."""

LAYER = re.compile(r"^(?:\w+\.)*(?:layers|h)\.\d+\.")
FLOAT32_BYTES = 4
IMPORTS_BYTES = 1 << 30
"""torch, transformers, and what a forward pass of a few rows takes beside the layer: an allowance. Beyond the imports the check of a 135M model took 0.33 GiB
(docs/benchmarks.md)."""


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


def merge_warnings(spec: FineTuneJobSpec, shapes: Mapping[str, tuple[int, ...]], limit_bytes: int | None) -> list[str]:
    """A warning where the publish stage may run out of memory when the GPU's work is done.

    Args:
        shapes: of every tensor in the model's files.
        limit_bytes: of this pod, which is that of publish's, too; None without one.
    """
    if not spec.output.merged.enabled or limit_bytes is None:
        return []
    needed = IMPORTS_BYTES + FLOAT32_BYTES * merge_check_weights(shapes)
    if needed <= limit_bytes:
        return []
    return [
        f"output.merged: checking the merged model takes up to {gibibytes(needed)} of memory (in float32, as on CPUs without bfloat16), and CPU stages have {gibibytes(limit_bytes)}: have the platform "
        "team raise cpuStages.limits.memory, or set output.merged.enabled: false"
    ]


def merge_check_weights(shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Of the largest decoder layer, and of what is read of it last: a tensor, or all experts, which are put together from their parts
    (finetune_trainer.publish.streamed)."""
    layers: Counter[str] = Counter()
    experts: Counter[str] = Counter()
    largest: dict[str, int] = {}
    for name, shape in shapes.items():
        if found := LAYER.match(name):
            layer, weights = found[0], math.prod(shape)
            layers[layer] += weights
            largest[layer] = max(largest.get(layer, 0), weights)
            experts[layer] += weights if ".experts." in name else 0
    return max((weights + max(largest[layer], experts[layer]) for layer, weights in layers.items()), default=0)
