"""Every reason a stage can end or wait for, with its exit code, what follows from it and what the user can do.

The reason stands in the termination message, the condition, the Event and the docs under the same name. A container's
exit code carries the reason even where its termination message is lost (a deleted pod).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from finetune_api.names import Stage


class Consequence(StrEnum):
    """What follows from a failure."""

    FAIL = "Fail"
    """Repeating cannot help: the job fails at once."""
    RETRY = "Retry"
    """May pass: repeated up to recovery.maxFailures times."""
    WAIT = "Wait"
    """Something is missing that somebody can mend: waited for, up to pendingTimeoutSeconds."""
    REPLACE = "Replace"
    """Came from outside: the execution is replaced, and that counts against nothing (see MAX_FRUITLESS)."""


MAX_FRUITLESS = 20
"""Executions of a stage that may be interrupted one after the other without any getting farther than the one before."""
MAX_RETURNS = 3
"""How often training may hand its GPU back and start at prepare again because something that it waited for did not appear."""
MAX_RESTARTS = 2
"""How often training is started again in its pod after it hung or a process died, before it has worked for an hour. The next failure
ends the pod, and another node may do better."""
GPU_PATIENCE_SECONDS = 600
"""How long a stage that holds a GPU waits for a store or the Hub before it fails and gives the GPU back."""


class Reason(StrEnum):
    """Stable names of failures. CamelCase, as condition reasons are."""

    INVALID_CONFIG = "InvalidConfig"
    INVALID_DATA = "InvalidData"
    TOO_FEW_ROWS = "TooFewRows"
    DATASET_NOT_FOUND = "DatasetNotFound"
    MODEL_NOT_FOUND = "ModelNotFound"
    BUCKET_NOT_FOUND = "BucketNotFound"
    ACCESS_DENIED = "AccessDenied"
    GATED_MODEL = "GatedModel"
    UNSUPPORTED_MODEL = "UnsupportedModel"
    UNKNOWN_TARGET_MODULE = "UnknownTargetModule"
    CHAT_TEMPLATE_MISSING = "ChatTemplateMissing"
    NO_GPU = "NoGPU"
    NON_FINITE_LOSS = "NonFiniteLoss"
    VERIFICATION_FAILED = "VerificationFailed"
    DIVERGED = "Diverged"
    USER_CODE = "UserCode"
    DOES_NOT_FIT = "DoesNotFit"
    OUT_OF_MEMORY = "OutOfMemory"
    DISK_FULL = "DiskFull"
    HUNG = "Hung"
    RANK_FAILURE = "RankFailure"
    SUPERSEDED = "Superseded"
    INTERRUPTED = "Interrupted"
    UNKNOWN = "Unknown"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    STORAGE_FULL = "StorageFull"
    HUB_UNAVAILABLE = "HubUnavailable"
    SECRET_MISSING = "SecretMissing"
    PODS_MISSING = "PodsMissing"
    # Seen by the operator from outside the container, so without an exit code.
    IMAGE_UNAVAILABLE = "ImageUnavailable"
    UNSCHEDULABLE = "Unschedulable"
    VOLUME_UNAVAILABLE = "VolumeUnavailable"
    NODE_LOST = "NodeLost"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    EVICTED = "Evicted"
    PREEMPTED = "Preempted"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    PENDING_TIMEOUT = "PendingTimeout"
    NAME_CONFLICT = "NameConflict"
    ADMISSION_REFUSED = "AdmissionRefused"


@dataclass(frozen=True)
class Failure:
    """One row of the table."""

    reason: Reason
    exit_code: int | None
    consequence: Consequence
    meaning: str
    advice: str
    other_advice: dict[Stage, str] = field(default_factory=dict)
    """Where a stage's resources are not the spec's to change: the CPU stages get the operator's."""
    healed_in_pod: str = ""
    """What the training pod does about it by itself, before anything else sees it."""
    proof: str = "produced"
    """How tests bring it about. Simulated: what only a GPU or a node under pressure can cause is raised or reported in its own words."""

    def advice_in(self, stage: Stage) -> str:
        """What to do if it happened in a stage."""
        return self.other_advice.get(stage, self.advice)


def _row(
    reason: Reason,
    code: int | None,
    consequence: Consequence,
    meaning: str,
    advice: str,
    other_advice: dict[Stage, str] | None = None,
    healed_in_pod: str = "",
    proof: str = "produced",
) -> Failure:
    return Failure(reason, code, consequence, meaning, advice, other_advice or {}, healed_in_pod, proof)


_CPU_MEMORY = "Have the platform team raise cpuStages.limits.memory in the operator's chart: compute.memory is the training pod's."
_CPU_ROOM = "Have the platform team raise cpuStages.requests (memory or ephemeralStorage) in the operator's chart to what the stage needs."


_F, _R, _W, _I = Consequence.FAIL, Consequence.RETRY, Consequence.WAIT, Consequence.REPLACE

FAILURES: dict[Reason, Failure] = {
    f.reason: f
    for f in (
        _row(
            Reason.INVALID_CONFIG,
            10,
            _F,
            "The spec asks for something that cannot work.",
            "Change the field that the message names.",
        ),
        _row(Reason.INVALID_DATA, 11, _F, "Rows cannot be used.", "Fix the rows, or set data.checks.maxBadRows."),
        _row(
            Reason.TOO_FEW_ROWS,
            12,
            _F,
            "After the checks too few rows are left to train and to hold out.",
            "Add rows, or give data.heldOut another fraction or its own sources.",
        ),
        _row(
            Reason.DATASET_NOT_FOUND,
            13,
            _F,
            "A data source does not exist.",
            "Check data.train[].uri, data.heldOut.sources[].uri and evaluation.generation.sources[].uri.",
        ),
        _row(
            Reason.MODEL_NOT_FOUND,
            14,
            _F,
            "The base model or its revision does not exist.",
            "Check model.uri and model.revision.",
        ),
        _row(Reason.BUCKET_NOT_FOUND, 15, _F, "The bucket does not exist.", "Create the bucket, or correct the uri."),
        _row(
            Reason.ACCESS_DENIED,
            16,
            _F,
            "The credentials were refused.",
            "Check the Secret's keys and values, and what they may read and write.",
        ),
        _row(
            Reason.GATED_MODEL,
            17,
            _F,
            "The model is gated and the request had no token that may read it.",
            "Accept the model's terms on the Hub and put HF_TOKEN into the Secret that model.secretRef names.",
        ),
        _row(
            Reason.UNSUPPORTED_MODEL,
            18,
            _F,
            "The model folder cannot be fine-tuned here.",
            "Choose a causal language model with safetensors weights.",
        ),
        _row(
            Reason.UNKNOWN_TARGET_MODULE,
            19,
            _F,
            "A target module does not exist in this model.",
            "Use one of the names that the message lists, or all-linear.",
        ),
        _row(
            Reason.CHAT_TEMPLATE_MISSING,
            20,
            _F,
            "The tokenizer has no chat template, and the rows need one.",
            "Use an instruct model, or prompt/completion or text rows.",
        ),
        _row(
            Reason.NO_GPU,
            21,
            _F,
            "The container sees no GPU.",
            "Check the device plugin, compute.gpu.resourceName and, where NVIDIA's is not the default container runtime, "
            "runtime.runtimeClassName; for a run on the CPU set training.useCpu: true.",
        ),
        _row(
            Reason.NON_FINITE_LOSS, 22, _F, "The loss became NaN or infinite.", "Lower training.optimizer.learningRate."
        ),
        _row(
            Reason.VERIFICATION_FAILED,
            23,
            _F,
            "What was read back from the bucket does not behave as what was trained.",
            "Do not use the artifacts. Check the base model's revision and the bucket, then run the job again.",
        ),
        _row(
            Reason.DIVERGED,
            24,
            _F,
            "The training loss rose far above where it began, and stayed there.",
            "Lower training.optimizer.learningRate or lengthen training.warmup; recovery.stopOnDivergence: false trains on.",
            proof="simulated: the loss is multiplied",
        ),
        _row(
            Reason.USER_CODE,
            25,
            _F,
            "Code that came with the model failed.",
            "Mend the code that the message names, or set model.trustRemoteCode: false if transformers knows the model itself.",
        ),
        _row(
            Reason.DOES_NOT_FIT,
            26,
            _F,
            "By its memory plan the run does not fit the GPU, so none was asked for.",
            "Take one of the changes that the message lists; if the GPU has more memory than was assumed, declare it in "
            "compute.gpu.memory.",
        ),
        _row(
            Reason.OUT_OF_MEMORY,
            40,
            _F,
            "The GPU's memory did not suffice, and nothing that recovery.outOfMemory.actions allows is left to try.",
            "Use QLoRA or a smaller training.maxSequenceTokens, or allow ShorterSequences in recovery.outOfMemory.actions.",
            healed_in_pod=(
                "training goes on from the last completed step with half the micro-batch and twice the accumulation, then with "
                "gradient checkpointing, then with what else `recovery.outOfMemory.actions` allows"
            ),
            proof="simulated",
        ),
        _row(
            Reason.DISK_FULL,
            42,
            _R,
            "The container's disk is full.",
            "Raise compute.ephemeralStorage, so that the pod gets a node with more room.",
        ),
        _row(
            Reason.HUNG,
            43,
            _R,
            "Training showed no sign of life for recovery.hungTimeoutSeconds.",
            "Read the pod's log: it holds the stack of every thread. If single steps take so long, raise recovery.hungTimeoutSeconds.",
            healed_in_pod=f"the processes are started again from the last checkpoint, up to {MAX_RESTARTS} times",
        ),
        _row(
            Reason.RANK_FAILURE,
            44,
            _R,
            "A training process died, or the ranks lost each other.",
            "Read the pod's log for what the rank said last. Repeated failures on one node point to its GPU or network.",
            healed_in_pod=f"the processes are started again from the last checkpoint, up to {MAX_RESTARTS} times",
            proof="produced; NCCL's and CUDA's errors simulated",
        ),
        _row(
            Reason.SUPERSEDED,
            45,
            _R,
            "Another execution of this job has taken over.",
            "Nothing to do, unless two clusters run the same FineTuneJob into the same bucket: then delete one of them.",
        ),
        _row(
            Reason.INTERRUPTED,
            60,
            _I,
            "The container was told to stop or was killed from outside.",
            "Nothing to do: it is started again.",
        ),
        _row(Reason.UNKNOWN, 1, _R, "An error that has no name here.", "Read the pod's log."),
        _row(
            Reason.STORAGE_UNAVAILABLE,
            61,
            _W,
            "The object store cannot be reached.",
            "Check the endpoint and the network path to it.",
        ),
        _row(
            Reason.STORAGE_FULL,
            64,
            _W,
            "The bucket takes no more data.",
            "Free space in the bucket or raise its quota.",
            proof="simulated: a proxy before the store answers so",
        ),
        _row(
            Reason.HUB_UNAVAILABLE,
            62,
            _W,
            "The model hub or web server cannot be reached.",
            "Check the endpoint and the network path to it.",
        ),
        _row(
            Reason.SECRET_MISSING,
            63,
            _W,
            "A Secret, or a key in it, is missing.",
            "Create the Secret in the job's namespace.",
        ),
        _row(
            Reason.PODS_MISSING,
            65,
            _W,
            "Not all pods of a training on several nodes got a place in time.",
            "Check that compute.nodes nodes have compute.gpusPerNode free GPUs each; a Kueue queue (queue.name) gives all or none.",
        ),
        _row(
            Reason.IMAGE_UNAVAILABLE,
            None,
            _W,
            "An image cannot be pulled.",
            "Check the image's name and runtime.imagePullSecrets.",
        ),
        _row(
            Reason.UNSCHEDULABLE,
            None,
            _W,
            "No node has room for the pod.",
            "Free or add the resource that the message names, or ask for less.",
        ),
        _row(
            Reason.VOLUME_UNAVAILABLE,
            None,
            _W,
            "A volume cannot be mounted.",
            "Check that the PersistentVolumeClaim exists and is bound.",
        ),
        _row(
            Reason.NODE_LOST,
            None,
            _W,
            "A node does not confirm that a deleted pod has stopped.",
            "Bring the node back, or, once it is surely off, delete its Node object: then the pod is replaced.",
            proof="produced in `make chaos`: a node loses its power",
        ),
        _row(
            Reason.HOST_OUT_OF_MEMORY,
            41,
            _R,
            "The container used more memory than its limit and was killed.",
            "Raise compute.memory, or let it grow by itself with recovery.outOfMemory.maxMemory.",
            dict.fromkeys((Stage.PREPARE, Stage.PUBLISH, Stage.COMBINE), _CPU_MEMORY),
        ),
        _row(
            Reason.EVICTED,
            None,
            _R,
            "The node evicted the pod.",
            "Raise compute.ephemeralStorage or compute.memory to what the stage needs.",
            {
                Stage.PREPARE: _CPU_ROOM,
                Stage.PUBLISH: (
                    "Raise compute.ephemeralStorage, or have the platform team raise cpuStages.requests.memory in the "
                    "operator's chart, to what the stage needs."
                ),
                Stage.COMBINE: _CPU_ROOM,
            },
            proof="simulated",
        ),
        _row(
            Reason.PREEMPTED,
            None,
            _I,
            "The pod had to make room: for a pod of higher priority, for the queue, or because its node is drained.",
            "Nothing to do: it goes on from its last checkpoint when it gets a place.",
            proof="produced with Kueue and by the Eviction API; other disruptions as the API server reports them",
        ),
        _row(
            Reason.DEADLINE_EXCEEDED,
            None,
            _F,
            "The job ran longer than activeDeadlineSeconds.",
            "Raise activeDeadlineSeconds.",
        ),
        _row(
            Reason.PENDING_TIMEOUT,
            None,
            _F,
            "What was missing did not appear in time.",
            "Provide it, then create the job again.",
        ),
        _row(
            Reason.NAME_CONFLICT,
            None,
            _F,
            "An object that this job must create exists and belongs to something else.",
            "Delete or rename that object, then create the job again.",
        ),
        _row(
            Reason.ADMISSION_REFUSED,
            None,
            _W,
            "The API server refused an object of this job.",
            "Read the message: a quota, a limit range, a policy, an admission webhook or a missing service account "
            "stands in the way.",
        ),
    )
}

_BY_EXIT_CODE = {f.exit_code: f for f in FAILURES.values() if f.exit_code is not None}

PERMANENT_EXIT_CODES: tuple[int, ...] = tuple(
    sorted(f.exit_code for f in FAILURES.values() if f.exit_code is not None and f.consequence is Consequence.FAIL)
)
"""Exit codes after which a Job must not start another pod (podFailurePolicy FailJob)."""

HANDED_BACK_EXIT_CODES: tuple[int, ...] = tuple(
    sorted(f.exit_code for f in FAILURES.values() if f.exit_code is not None and f.consequence is Consequence.WAIT)
)
"""Exit codes of a training pod that waited as long as it may hold a GPU for nothing: its Job ends, and prepare waits instead."""

INTERRUPTED_EXIT_CODES = (60, 130, 137, 143)
"""Exit codes that do not count against recovery.maxFailures: told to stop, or a signal from outside. 137 may also be the
container's own memory limit; the operator counts those that the kubelet calls OOMKilled."""


def by_exit_code(code: int) -> Failure:
    """The failure that an exit code stands for; any code that is not in the table is Unknown.

    130, 137 and 143 are signals from outside. (Where it was the container's own memory limit that killed it, the kubelet says
    OOMKilled beside the 137, and that is looked at first.)
    """
    if code in INTERRUPTED_EXIT_CODES:
        return FAILURES[Reason.INTERRUPTED]
    return _BY_EXIT_CODE.get(code, FAILURES[Reason.UNKNOWN])
