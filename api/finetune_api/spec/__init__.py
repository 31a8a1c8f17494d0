"""``FineTuneJob.spec``, a module for each of its parts."""

from finetune_api.spec.compute import MOST_GPUS_PER_NODE, MOST_NODES, Compute, Gpu, Queue
from finetune_api.spec.data import (
    Data,
    DataChecks,
    DataSource,
    HeldOut,
    NearDuplicates,
    Overlength,
    PiiPolicy,
)
from finetune_api.spec.evaluation import EarlyStopping, Evaluation, Generation, Judge, TextMetric
from finetune_api.spec.job import IMMUTABLE_FIELDS, OPTIONAL_FIELDS, FineTuneJobSpec
from finetune_api.spec.method import (
    LayerIndex,
    Lora,
    LoraBias,
    LoraInitialization,
    Method,
    MethodType,
    Quantization,
    QuantizationType,
)
from finetune_api.spec.model import InitialAdapter, Model, ModelCache
from finetune_api.spec.objective import LossOn, Objective, ObjectiveType, SupervisedFineTuning
from finetune_api.spec.output import DeletionPolicy, Merged, MergedBase, MergedDtype, Output, Selection, Workspace
from finetune_api.spec.recovery import (
    Checkpoint,
    CheckpointInterval,
    OutOfMemory,
    OutOfMemoryAction,
    Recovery,
    Retention,
)
from finetune_api.spec.references import LocalObjectReference, RemoteSource
from finetune_api.spec.rows import DataFormat, RowTemplate
from finetune_api.spec.runtime import EnvVar, Runtime, Toleration
from finetune_api.spec.tasks import EvaluationTask
from finetune_api.spec.trackers import TRACKER_RULES, Tracker, TrackerType
from finetune_api.spec.training import (
    ComputeDtype,
    CpuOffload,
    Length,
    Optimizer,
    Parallelism,
    Scheduler,
    Training,
    Warmup,
)

__all__ = [
    "IMMUTABLE_FIELDS",
    "MOST_GPUS_PER_NODE",
    "MOST_NODES",
    "OPTIONAL_FIELDS",
    "TRACKER_RULES",
    "Checkpoint",
    "CheckpointInterval",
    "Compute",
    "ComputeDtype",
    "CpuOffload",
    "Data",
    "DataChecks",
    "DataFormat",
    "DataSource",
    "DeletionPolicy",
    "EarlyStopping",
    "EnvVar",
    "Evaluation",
    "EvaluationTask",
    "FineTuneJobSpec",
    "Generation",
    "Gpu",
    "HeldOut",
    "InitialAdapter",
    "Judge",
    "LayerIndex",
    "Length",
    "LocalObjectReference",
    "Lora",
    "LoraBias",
    "LoraInitialization",
    "LossOn",
    "Merged",
    "MergedBase",
    "MergedDtype",
    "Method",
    "MethodType",
    "Model",
    "ModelCache",
    "NearDuplicates",
    "Objective",
    "ObjectiveType",
    "Optimizer",
    "OutOfMemory",
    "OutOfMemoryAction",
    "Output",
    "Overlength",
    "Parallelism",
    "PiiPolicy",
    "Quantization",
    "QuantizationType",
    "Queue",
    "Recovery",
    "RemoteSource",
    "Retention",
    "RowTemplate",
    "Runtime",
    "Scheduler",
    "Selection",
    "SupervisedFineTuning",
    "TextMetric",
    "Toleration",
    "Tracker",
    "TrackerType",
    "Training",
    "Warmup",
    "Workspace",
]
