"""``FineTuneJob.status``: what is, why, and what to do."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import Field

from finetune_api.base import ApiModel
from finetune_api.progress import Restart, Split, StageReport, Transfer
from finetune_api.scores import JudgeVerdict, TaskScore, TextMetrics

DATE_TIME = {"format": "date-time"}


class Phase(StrEnum):
    """A one-word summary for people; machines read conditions."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    TRAINING = "Training"
    PUBLISHING = "Publishing"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"
    SUSPENDED = "Suspended"


class ConditionType(StrEnum):
    """Conditions. Finished is true exactly when Complete or Failed is; Waiting names what is missing while something is.
    CheckpointAtRisk: a pod that is told to stop would not have the time to save, or checkpoints cannot be stored."""

    COMPLETE = "Complete"
    FAILED = "Failed"
    FINISHED = "Finished"
    SUSPENDED = "Suspended"
    PREPARED = "Prepared"
    TRAINED = "Trained"
    WAITING = "Waiting"
    CHECKPOINT_AT_RISK = "CheckpointAtRisk"


class Condition(ApiModel):
    """metav1.Condition."""

    type: Annotated[str, Field(max_length=316)]
    status: Literal["True", "False", "Unknown"]
    observed_generation: int | None = None
    last_transition_time: Annotated[str, Field(json_schema_extra=DATE_TIME)]
    reason: Annotated[str, Field(max_length=1024, pattern=r"^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$")]
    message: Annotated[str, Field(max_length=32768)]


class ExecutionProgress(ApiModel):
    """How far an earlier execution of training came, kept while a later one posts."""

    execution_id: str
    step: int | None = None
    resumed_from_step: int | None = None
    checkpoint_step: int | None = None
    peak_memory_bytes: int | None = None
    restarts: Annotated[list[Restart], Field(max_length=16)] | None = Field(
        None, json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )


class ProgressStatus(ApiModel):
    """Live progress. Written by the progress endpoint alone, under its own field manager."""

    execution_id: str | None = None
    stage: str | None = None
    sequence: int | None = None
    activity: str | None = None
    summary: str | None = Field(None, description="<step>/<total steps>")
    step: int | None = None
    total_steps: int | None = None
    epoch: float | None = None
    loss: float | None = None
    learning_rate: float | None = None
    tokens_per_second: float | None = None
    eta: str | None = Field(None, description="Time left, as a Go duration rounded for people.")
    held_out_loss: float | None = None
    download: Transfer | None = None
    merge: Transfer | None = None
    upload: Transfer | None = None
    resumed_from_step: int | None = None
    checkpoint_step: int | None = Field(None, description="The newest step whose checkpoint is complete in the bucket.")
    checkpoint_seconds: float | None = Field(None, description="How long saving that checkpoint took.")
    checkpoint_problem: str | None = Field(None, description="Why checkpoints cannot be stored just now.")
    peak_memory_bytes: int | None = Field(None, description="The most memory the training container has held.")
    split: Split | None = Field(None, description="How a step is cut now, where that differs from the plan.")
    restarts: Annotated[list[Restart], Field(max_length=16)] | None = Field(
        None, json_schema_extra={"x-kubernetes-list-type": "atomic"}
    )
    earlier: Annotated[list[ExecutionProgress], Field(max_length=4)] | None = Field(
        None,
        description="Earlier executions of training, oldest first.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    waiting_reason: str | None = None
    waiting_message: str | None = None
    report: StageReport | None = Field(
        None, description="The stage's final report, kept for an operator that could not see its pod end."
    )
    updated_at: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None


class GpuStock(ApiModel):
    """GPUs of one kind on the nodes that a training pod may land on."""

    product: Annotated[str, Field(max_length=63)] = Field(description="Node label nvidia.com/gpu.product.")
    nodes: int
    total: int
    most_per_node: int = Field(description="The most that one node has.")
    free: int | None = Field(
        None,
        description=(
            "What nodes that take pods offer, minus what pods that have not ended ask for; absent where the operator may not list all pods."
        ),
    )
    most_free_on_a_node: int | None = None


class PlanStatus(ApiModel):
    """The resolved method and sizes."""

    method: str
    rank: int | None = Field(None, description="Of the adapter.")
    alpha: int | None = Field(None, description="Of the adapter.")
    learning_rate: float
    micro_batch_sequences: int
    gradient_accumulation_steps: int
    gpus_per_node: int | None = Field(
        None, description="GPUs of the training pod: what was asked for, or what Auto became."
    )
    total_steps: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    needed_memory_bytes: int | None = Field(None, description="The most that one GPU will hold, as planned.")
    usable_memory_bytes: int | None = Field(None, description="What a process can allocate on the GPU planned for.")
    unsuitable_gpu_products: list[str] | None = Field(
        None,
        description="GPUs of the cluster (label nvidia.com/gpu.product) that cannot hold it: the training pod avoids them.",
    )
    gpu_stock: Annotated[list[GpuStock], Field(max_length=16)] | None = Field(
        None,
        description=(
            "The kinds of GPU that it fits, and what was free of them when that was last looked at: where the job leaves a choice, and while "
            "its pod finds no place."
        ),
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    availability: str | None = Field(None, description="The same in words, and how many GPUs the run takes.")
    memory: str | None = Field(None, description="The memory plan in words, and why method and micro-batch are so.")
    summary: str = Field("", description="The plan in one sentence.")


class DataStatus(ApiModel):
    """What the data checks found."""

    rows: int
    train_rows: int
    held_out_rows: int
    bad_rows: int
    truncated_rows: int
    duplicate_rows: int
    hash: str
    summary: str


class MetricsStatus(ApiModel):
    """Losses on learned tokens: Σ NLL / Σ tokens; and what answers score."""

    held_out_loss_base: float
    held_out_loss: float
    perplexity_base: float
    perplexity: float
    token_accuracy_base: float | None = Field(
        None,
        description="Share of the learned tokens of the held-out rows that the base gives the highest probability.",
    )
    token_accuracy: float | None = Field(None, description="The same of the tuned model.")
    final_train_loss: float
    tokens_per_second: float
    text: TextMetrics | None = Field(None, description="What the answers of base and tuned model score.")
    judge: JudgeVerdict | None = Field(None, description="Whose answers evaluation.judge prefers.")
    tasks: list[TaskScore] | None = Field(None, description="The first number of each of evaluation.tasks.")
    summary: str


class GpuTimeStatus(ApiModel):
    """What the GPUs were held for. GPU-seconds: of a pod with two GPUs, each second counts twice."""

    held_seconds: int = Field(
        description="From when a training pod was bound to its node until it ended, over all pods, each for itself."
    )
    training_seconds: int | None = Field(
        None,
        description="In which optimizer steps were made that count, and evaluations that were asked for between them.",
    )
    utilization: float | None = Field(None, description="trainingSeconds / heldSeconds.")
    summary: str


class GpuHolder(ApiModel):
    """A training pod that holds GPUs, or has held them and is still there."""

    execution_id: str
    since: Annotated[str, Field(json_schema_extra=DATE_TIME)] = Field(description="It was bound to its node.")
    until: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = Field(
        None, description="It ended: its time is part of gpuTime."
    )


class ArtifactsStatus(ApiModel):
    """Where the results are."""

    uri: str
    manifest_uri: str | None = Field(None, alias="manifestURI")
    adapter_uri: str | None = Field(None, alias="adapterURI")
    adapter_bytes: int | None = None
    merged_uri: str | None = Field(None, alias="mergedURI")
    merged_bytes: int | None = None
    model_uri: str | None = Field(None, alias="modelURI", description="The model that method Full trained.")
    model_bytes: int | None = None
    reports_uri: str | None = Field(None, alias="reportsURI")


class AttemptStatus(ApiModel):
    """One execution of a stage: one pod."""

    execution_id: str
    stage: str
    pod: str
    node: str | None = None
    scheduled_at: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = Field(
        None, description="Its pod was bound to a node, and held that node's GPUs from then on."
    )
    started_at: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None
    finished_at: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None
    exit_code: int | None = None
    outcome: Literal["Running", "Succeeded", "Failed"] = "Running"
    reason: str | None = None
    message: Annotated[str, Field(max_length=2048)] | None = None
    resumed_from_step: int | None = Field(None, description="Training went on from this step's checkpoint.")
    last_step: int | None = Field(None, description="The last step that it reported.")
    checkpoint_step: int | None = Field(None, description="Its newest step that is safe in the bucket.")
    memory: str | None = Field(None, description="The memory that its container had, where the spec names one.")
    index: int | None = Field(
        None,
        description=(
            "Which of several pods that train together, if not the first. Only those stand here that ended for a reason of their own."
        ),
    )


class RecoveryStatus(ApiModel):
    """Something that went wrong and was mended without anybody's help."""

    at: Annotated[str, Field(json_schema_extra=DATE_TIME)]
    execution_id: str
    reason: str
    message: Annotated[str, Field(max_length=1024)]


class SnapshotStatus(ApiModel):
    """What the run is frozen to."""

    hash: str
    config_map: str
    images: dict[str, str] = {}
    model_commit: str | None = None
    data_hash: str | None = None


class StageTimes(ApiModel):
    """When a stage's Job was created and when it ended."""

    stage: str
    started_at: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None
    finished_at: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None


Conditions = Annotated[
    list[Condition],
    Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
]
"""Of either kind's status, one of each type."""


class FineTuneJobStatus(ApiModel):
    """Observed state."""

    phase: Phase | None = None
    observed_generation: int | None = None
    message: str | None = Field(None, description="One sentence for people: what happens now or how it ended.")
    model_name: str | None = None
    conditions: Conditions = []
    start_time: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None
    completion_time: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None
    active_seconds: int | None = Field(
        None, description="Running time that counts against activeDeadlineSeconds, up to runningSince."
    )
    running_since: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = None
    waiting_since: Annotated[str, Field(json_schema_extra=DATE_TIME)] | None = Field(
        None, description="Since when the one thing that the Waiting condition names has been missing."
    )
    gpu_held: bool | None = Field(
        None, description="A training pod that asks for a GPU has been bound to a node: from then on the GPU was held."
    )
    stages: Annotated[
        list[StageTimes],
        Field(
            max_length=3, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["stage"]}
        ),
    ] = []
    attempts: Annotated[
        list[AttemptStatus],
        Field(
            max_length=64,
            json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["executionId"]},
        ),
    ] = []
    recoveries: Annotated[
        list[RecoveryStatus], Field(max_length=32, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = []
    plan: PlanStatus | None = None
    data: DataStatus | None = None
    metrics: MetricsStatus | None = None
    gpu_time: GpuTimeStatus | None = None
    gpu_holders: Annotated[
        list[GpuHolder], Field(max_length=128, json_schema_extra={"x-kubernetes-list-type": "atomic"})
    ] = Field([], description="Training pods that are counted for gpuTime, until the job has finished.")
    artifacts: ArtifactsStatus | None = None
    snapshot: SnapshotStatus | None = None
    progress: ProgressStatus | None = None
