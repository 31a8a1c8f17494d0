"""Names, labels and paths that operator and pods must agree on."""

from __future__ import annotations

from enum import StrEnum


class Stage(StrEnum):
    """The Jobs of a FineTuneJob: the pipeline's three, in order, the one that may run beside a queued training Job, and the one that may
    follow its deletion; and the one of an AdapterCombination."""

    PREPARE = "prepare"
    TRAIN = "train"
    PUBLISH = "publish"
    FETCH = "fetch"
    CLEANUP = "cleanup"
    COMBINE = "combine"


PIPELINE = (Stage.PREPARE, Stage.TRAIN, Stage.PUBLISH)
"""What a FineTuneJob runs through. Fetch is no part of it, as nothing waits for it, nor is cleanup, which runs once the FineTuneJob is
being deleted."""


GPU_RESOURCE = "nvidia.com/gpu"
GPU_PRODUCT_LABEL, GPU_MEMORY_LABEL = f"{GPU_RESOURCE}.product", f"{GPU_RESOURCE}.memory"
GPU_COUNT_LABEL, GPU_REPLICAS_LABEL = f"{GPU_RESOURCE}.count", f"{GPU_RESOURCE}.replicas"
"""Labels that NVIDIA's GPU feature discovery puts on nodes: the memory of one GPU in MiB; how many there are; how many pods share each."""
LABEL_UID = "finetune.dev/job-uid"
LABEL_NAME = "finetune.dev/job-name"
LABEL_STAGE = "finetune.dev/stage"
ANNOTATION_SNAPSHOT_HASH = "finetune.dev/snapshot-hash"
ANNOTATION_MEMORY = "finetune.dev/memory"
"""On the training Job: the memory that its pods get, which may have grown since the spec."""
FINALIZER_DELETE_OUTPUT = "finetune.dev/delete-output"
"""Keeps a FineTuneJob with output.deletionPolicy: Delete until its artifacts are gone."""

SNAPSHOT_MOUNT = "/etc/finetune/snapshot"
SNAPSHOT_KEY = "snapshot.json"
CA_KEY = "ca.crt"
SECRETS_MOUNT = "/etc/finetune/secrets"
"""Each source's Secret is mounted at <SECRETS_MOUNT>/<slot>, ``optional: true``."""
PVC_MOUNT = "/mnt/pvc"
"""Each claim is mounted read-only at <PVC_MOUNT>/<claim>."""
CACHE_MOUNT = "/mnt/model-cache"
"""The claim that model.cache names, writable."""
TOKEN_MOUNT = "/var/run/secrets/finetune.dev/progress"
TOKEN_KEY = "token"
TOKEN_AUDIENCE = "progress.finetune.dev"
WORK_MOUNT = "/work"
"""An emptyDir: the only large writable place; HOME, caches and downloads live below it."""

ENV_STAGE = "FINETUNE_STAGE"
ENV_ENDPOINT = "FINETUNE_PROGRESS_URL"
ENV_POD_UID = "FINETUNE_POD_UID"
ENV_POD_NAME = "FINETUNE_POD_NAME"
ENV_GRACE_SECONDS = "FINETUNE_GRACE_SECONDS"
"""The pod's terminationGracePeriodSeconds: how long after SIGTERM it is killed."""
ENV_GPUS_PER_NODE = "FINETUNE_GPUS_PER_NODE"
ENV_LEADER = "FINETUNE_LEADER"
"""``host:port`` of the first of several training pods."""
ENV_NODE_INDEX = "JOB_COMPLETION_INDEX"
"""Set by the Job controller in every pod of an Indexed Job."""
ENV_LM_EVAL = "FINETUNE_LM_EVAL"
"""Set in the trainer image: the folder that lm-eval is installed in."""
ENV_SNAPSHOT = "FINETUNE_SNAPSHOT"
"""The run snapshot itself, for a pod that may outlive the ConfigMap that holds it, or whose resource has none."""

UID_CHARACTERS = 8
MAX_JOB_NAME = 40
"""<name>-<uid8>-publish-xxxxx must fit a 63 character hostname."""


def job_key(name: str, uid: str) -> str:
    """``<name>-<uid8>``: the prefix of all children and of the output folder."""
    return f"{name}-{uid[:UID_CHARACTERS]}"


def stage_job_name(name: str, uid: str, stage: Stage) -> str:
    """Name of a stage's Job."""
    return f"{job_key(name, uid)}-{stage}"


def train_service_name(name: str, uid: str) -> str:
    """The headless Service of training pods. A Service's name begins with a letter, a FineTuneJob's need not."""
    return f"train-{job_key(name, uid)}"


def snapshot_name(name: str, uid: str) -> str:
    """Name of the ConfigMap that holds the run snapshot."""
    return f"{job_key(name, uid)}-snapshot"


MODEL_SLOT = "model"
OUTPUT_SLOT = "output"
INITIAL_ADAPTER_SLOT = "initial-adapter"
JUDGE_SLOT = "judge"


def adapter_slot(index: int) -> str:
    """Secret slot of ``adapters[index]`` of an AdapterCombination."""
    return f"adapter-{index}"


def train_slot(index: int) -> str:
    """Secret slot of ``data.train[index]``."""
    return f"train-{index}"


def held_out_slot(index: int) -> str:
    """Secret slot of ``data.heldOut.sources[index]``."""
    return f"held-out-{index}"


def prompts_slot(index: int) -> str:
    """Secret slot of ``evaluation.generation.sources[index]``."""
    return f"prompts-{index}"


def task_slot(index: int) -> str:
    """Secret slot of ``evaluation.tasks[index]``."""
    return f"task-{index}"


def tracker_slot(kind: str) -> str:
    """Secret slot of the tracker of a type."""
    return f"tracker-{kind.lower()}"
