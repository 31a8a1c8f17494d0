"""Memory planner: what a run will hold on a GPU, from shapes alone, before a GPU is asked for.

``parse_config`` and ``describe`` (or ``parameter_shapes``), with ``request_of``, make a :class:`Request`; ``plan`` makes a :class:`MemoryPlan` of it,
``fit`` judges that for a GPU, ``choose`` picks method and micro-batch. docs/planner.md says how exact it is.
"""

from finetune_api.planner.architecture import Architecture, UnknownArchitecture, parse_config
from finetune_api.planner.base_model import why_not_tunable
from finetune_api.planner.choose import Choice, choose, choose_among
from finetune_api.planner.distributed import Layout
from finetune_api.planner.fit import Alternative, Fit, fit
from finetune_api.planner.four_bit import left_in_16_bit
from finetune_api.planner.from_spec import (
    Unsuitable,
    by_compute_dtype,
    gpu_counts,
    host_memory_misfit,
    is_shardable,
    loaded_by_layers,
    possible,
    refuses,
    request_of,
    rounds,
)
from finetune_api.planner.gpus import Gpu, UnknownGpu, find_gpu, known_gpus, labelled_gpu
from finetune_api.planner.linears import UnknownTarget
from finetune_api.planner.plan import MemoryPlan, Request, plan
from finetune_api.planner.sentences import misfit_sentence, plan_sentence
from finetune_api.planner.tensors import Shapes, describe, parameter_shapes
from finetune_api.planner.workload import Attention, Batch, Tuning

__all__ = [
    "Alternative",
    "Architecture",
    "Attention",
    "Batch",
    "Choice",
    "Fit",
    "Gpu",
    "Layout",
    "MemoryPlan",
    "Request",
    "Shapes",
    "Tuning",
    "UnknownArchitecture",
    "UnknownGpu",
    "UnknownTarget",
    "Unsuitable",
    "by_compute_dtype",
    "choose",
    "choose_among",
    "describe",
    "find_gpu",
    "fit",
    "gpu_counts",
    "host_memory_misfit",
    "is_shardable",
    "known_gpus",
    "labelled_gpu",
    "left_in_16_bit",
    "loaded_by_layers",
    "misfit_sentence",
    "parameter_shapes",
    "parse_config",
    "plan",
    "plan_sentence",
    "possible",
    "refuses",
    "request_of",
    "rounds",
    "why_not_tunable",
]
