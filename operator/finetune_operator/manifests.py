"""Pure builders of the objects a FineTuneJob owns: the snapshot ConfigMap and one Job per stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finetune_api import API_VERSION, KIND
from finetune_api.names import (
    ANNOTATION_MEMORY,
    ANNOTATION_SNAPSHOT_HASH,
    CA_KEY,
    ENV_ENDPOINT,
    ENV_GPUS_PER_NODE,
    ENV_LEADER,
    ENV_SNAPSHOT,
    GPU_PRODUCT_LABEL,
    LABEL_NAME,
    LABEL_STAGE,
    LABEL_UID,
    PIPELINE,
    SNAPSHOT_KEY,
    SNAPSHOT_MOUNT,
    TOKEN_KEY,
    TOKEN_MOUNT,
    Stage,
    snapshot_name,
    stage_job_name,
    train_service_name,
)
from finetune_api.snapshot import Snapshot
from finetune_api.spec import FineTuneJobSpec
from finetune_operator.env_snapshot import for_cleanup
from finetune_operator.planning.model import AS_ASKED, Allotment, JobView, SnapshotRecord
from finetune_operator.pods import (
    GRACE_SECONDS,
    cpu_stage_resources,
    environment,
    failure_rules,
    restricted_pod,
    scratch_environment,
)
from finetune_operator.settings import Settings
from finetune_operator.volumes import volumes_and_mounts

Manifest = dict[str, Any]
KUEUE_QUEUE = "kueue.x-k8s.io/queue-name"
KUEUE_PRIORITY = "kueue.x-k8s.io/priority-class"
LEADER_PORT = 29400
"""Where the first of several training pods listens; torchrun's default."""


@dataclass(frozen=True)
class Owner:
    """The FineTuneJob that owns what is built, or the AdapterCombination."""

    namespace: str
    name: str
    uid: str
    kind: str = KIND

    @classmethod
    def of(cls, job: JobView) -> Owner:
        """The owner of a job's children."""
        return cls(job.namespace, job.name, job.uid, job.kind)

    def reference(self) -> Manifest:
        """A controller ownerReference."""
        return {
            "apiVersion": API_VERSION,
            "kind": self.kind,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }

    def labels(self, stage: Stage | None = None) -> dict[str, str]:
        """Labels by which children are found."""
        labels = {LABEL_UID: self.uid, LABEL_NAME: self.name, "app.kubernetes.io/managed-by": "finetune-operator"}
        return {**labels, LABEL_STAGE: stage.value} if stage else labels


def snapshot_config_map(owner: Owner, snapshot_json: str, digest: str, ca_bundle: str) -> Manifest:
    """The immutable ConfigMap that freezes a run."""
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {
            "name": snapshot_name(owner.name, owner.uid),
            "namespace": owner.namespace,
            "labels": owner.labels(),
            "annotations": {ANNOTATION_SNAPSHOT_HASH: digest},
            "ownerReferences": [owner.reference()],
        },
        "immutable": True,
        "data": {SNAPSHOT_KEY: snapshot_json, CA_KEY: ca_bundle},
    }


def stage_job(
    owner: Owner,
    record: SnapshotRecord,
    stage: Stage,
    settings: Settings,
    allotment: Allotment = AS_ASKED,
) -> Manifest:
    """The Job of a stage. Everything that shapes the run comes from the snapshot, never from the live spec, and from the plan that was
    made of it.
    """
    snapshot = record.snapshot
    if stage is Stage.TRAIN:
        snapshot = _allotted(snapshot, allotment)
    runtime = snapshot.spec.runtime
    labels = owner.labels(stage)
    annotations = {ANNOTATION_SNAPSHOT_HASH: record.digest}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": stage_job_name(owner.name, owner.uid, stage),
            "namespace": owner.namespace,
            "labels": {**labels, **_queue_labels(snapshot.spec, stage)},
            "annotations": {**annotations, **_memory_annotation(snapshot.spec, stage)},
            "ownerReferences": [owner.reference()],
        },
        "spec": {
            "backoffLimit": snapshot.spec.recovery.max_failures,
            **_pods_of(snapshot.spec, stage),
            # A new pod only after the old one is really gone: two executions never write at once.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": failure_rules(stage)},
            "template": {
                "metadata": {
                    "labels": {**(runtime.labels or {}), **labels},
                    "annotations": {**(runtime.annotations or {}), **annotations},
                },
                "spec": {
                    **_pod_spec(owner, snapshot, stage, settings),
                    **(_placement(owner, snapshot.spec, allotment) if stage is Stage.TRAIN else {}),
                },
            },
        },
    }


def _allotted(snapshot: Snapshot, allotment: Allotment) -> Snapshot:
    compute = snapshot.spec.compute
    settled = compute.model_copy(
        update={
            "memory": allotment.memory or compute.memory,
            "gpus_per_node": compute.gpus(allotment.gpus_per_node),
        }
    )
    return snapshot.model_copy(update={"spec": snapshot.spec.model_copy(update={"compute": settled})})


def _pods_of(spec: FineTuneJobSpec, stage: Stage) -> Manifest:
    """How many pods a stage's Job has. Several that train together know their index, and the first one's end is the Job's."""
    nodes = spec.compute.nodes if stage is Stage.TRAIN else 1
    if nodes == 1:
        return {"completions": 1, "parallelism": 1}
    return {
        "completionMode": "Indexed",
        "completions": nodes,
        "parallelism": nodes,
        "successPolicy": {"rules": [{"succeededIndexes": "0"}]},
    }


def train_service(owner: Owner) -> Manifest:
    """The headless Service by which training pods find the first one."""
    labels = owner.labels(Stage.TRAIN)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": train_service_name(owner.name, owner.uid),
            "namespace": owner.namespace,
            "labels": labels,
            "ownerReferences": [owner.reference()],
        },
        "spec": {
            "clusterIP": "None",
            # They meet before any of them is ready.
            "publishNotReadyAddresses": True,
            "selector": {name: labels[name] for name in (LABEL_UID, LABEL_STAGE)},
            "ports": [{"name": "supervisor", "port": LEADER_PORT}],
        },
    }


def _placement(owner: Owner, spec: FineTuneJobSpec, allotment: Allotment) -> Manifest:
    """Where training pods may be, and should."""
    affinity: Manifest = {}
    if allotment.avoid_gpus:
        others = {"key": GPU_PRODUCT_LABEL, "operator": "NotIn", "values": list(allotment.avoid_gpus)}
        terms = {"nodeSelectorTerms": [{"matchExpressions": [others]}]}
        affinity["nodeAffinity"] = {"requiredDuringSchedulingIgnoredDuringExecution": terms}
    if spec.compute.nodes == 1:
        return {"affinity": affinity} if affinity else {}
    mine = {"matchLabels": {LABEL_UID: owner.uid, LABEL_STAGE: Stage.TRAIN.value}}
    near = [
        {"weight": weight, "podAffinityTerm": {"labelSelector": mine, "topologyKey": key}}
        for weight, key in ((100, "kubernetes.io/hostname"), (50, "topology.kubernetes.io/zone"))
    ]
    affinity["podAffinity"] = {"preferredDuringSchedulingIgnoredDuringExecution": near}
    return {"affinity": affinity, "subdomain": train_service_name(owner.name, owner.uid)}


CLEANUP_RETRIES, CLEANUP_TTL_SECONDS = 3, 600


def cleanup_job(owner: Owner, snapshot: Snapshot, settings: Settings) -> Manifest:
    """The Job that deletes a deleted FineTuneJob's artifacts.

    It has no owner: a foreground deletion of the FineTuneJob would take it along. What it must know stands in its own
    environment, because the ConfigMap of the snapshot may be gone; a deadline ends it and a time to live removes it.
    """
    stage = Stage.CLEANUP
    runtime, labels = snapshot.spec.runtime, owner.labels(stage)
    pod = _pod_spec(owner, snapshot, stage, settings)
    pod["containers"][0]["env"].append({"name": ENV_SNAPSHOT, "value": for_cleanup(snapshot)})
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": stage_job_name(owner.name, owner.uid, stage),
            "namespace": owner.namespace,
            "labels": {**labels, **_queue_labels(snapshot.spec, stage)},
        },
        "spec": {
            "backoffLimit": CLEANUP_RETRIES,
            "completions": 1,
            "parallelism": 1,
            "activeDeadlineSeconds": snapshot.spec.pending_timeout_seconds,
            "ttlSecondsAfterFinished": CLEANUP_TTL_SECONDS,
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": failure_rules(stage)},
            "template": {
                "metadata": {
                    "labels": {**(runtime.labels or {}), **labels},
                    "annotations": dict(runtime.annotations or {}),
                },
                "spec": pod,
            },
        },
    }


def _memory_annotation(spec: FineTuneJobSpec, stage: Stage) -> dict[str, str]:
    memory = spec.compute.memory
    return {ANNOTATION_MEMORY: memory} if stage is Stage.TRAIN and memory is not None else {}


def grace_seconds(spec: FineTuneJobSpec, stage: Stage) -> int:
    """How long a stage's pod may take to stop."""
    return spec.recovery.termination_grace_period_seconds if stage is Stage.TRAIN else GRACE_SECONDS


def stage_image(snapshot: Snapshot, stage: Stage) -> str:
    """Only what needs torch, or lm-eval, runs in the large image."""
    if snapshot.spec.evaluation.tasks and stage in PIPELINE:
        return snapshot.images.train
    if stage is Stage.TRAIN or (stage is Stage.PUBLISH and snapshot.spec.publishes_model):
        return snapshot.images.train
    return snapshot.images.prepare


def _queue_labels(spec: FineTuneJobSpec, stage: Stage) -> dict[str, str]:
    queue = spec.queue.name if stage is Stage.TRAIN else spec.queue.cpu_name
    if queue is None:
        return {}
    labels = {KUEUE_QUEUE: queue}
    if stage is Stage.TRAIN and spec.queue.priority_class_name is not None:
        labels[KUEUE_PRIORITY] = spec.queue.priority_class_name
    return labels


def _pod_spec(owner: Owner, snapshot: Snapshot, stage: Stage, settings: Settings) -> Manifest:
    spec = snapshot.spec
    runtime = spec.runtime
    volumes, mounts = volumes_and_mounts(spec, stage, snapshot_name(owner.name, owner.uid))
    pod = restricted_pod(
        stage,
        stage_image(snapshot, stage),
        runtime,
        settings,
        env=_environment(owner, spec, stage, settings),
        resources=_resources(spec, stage, settings),
        volumes=volumes,
        mounts=mounts,
        grace_seconds=grace_seconds(spec, stage),
    )
    if stage is Stage.TRAIN:
        if runtime.runtime_class_name:
            pod["runtimeClassName"] = runtime.runtime_class_name
        selector = dict(runtime.node_selector or {})
        if spec.compute.gpu.product:
            selector[GPU_PRODUCT_LABEL] = spec.compute.gpu.product
        if selector:
            pod["nodeSelector"] = selector
        if runtime.tolerations:
            pod["tolerations"] = [t.to_json_dict() for t in runtime.tolerations]
    return pod


def _environment(owner: Owner, spec: FineTuneJobSpec, stage: Stage, settings: Settings) -> list[Manifest]:
    endpoint = f"{settings.progress_url.rstrip('/')}/v1/namespaces/{owner.namespace}/finetunejobs/{owner.name}"
    values = scratch_environment(stage, grace_seconds(spec, stage))
    # status.progress is the pipeline's: fetch runs beside training, and cleanup's FineTuneJob is about to be gone.
    if stage in PIPELINE:
        values[ENV_ENDPOINT] = endpoint
    if stage is Stage.TRAIN:
        values[ENV_GPUS_PER_NODE] = str(spec.compute.gpus_per_node)
        if spec.compute.nodes > 1:
            first, service = stage_job_name(owner.name, owner.uid, stage), train_service_name(owner.name, owner.uid)
            values[ENV_LEADER] = f"{first}-0.{service}:{LEADER_PORT}"
        # transformers' own KubeflowCallback reports with these, also from code that knows nothing of us.
        values["KUBEFLOW_TRAINER_SERVER_URL"] = endpoint
        values["KUBEFLOW_TRAINER_SERVER_CA_CERT"] = f"{SNAPSHOT_MOUNT}/{CA_KEY}"
        values["KUBEFLOW_TRAINER_SERVER_TOKEN"] = f"{TOKEN_MOUNT}/{TOKEN_KEY}"
    # NCCL says in the log why a collective failed; runtime.env may ask for more, and name interfaces.
    return environment(values, spec.runtime.env, {"NCCL_DEBUG": "WARN"} if stage is Stage.TRAIN else None)


def _resources(spec: FineTuneJobSpec, stage: Stage, settings: Settings) -> Manifest:
    """The training pod gets what compute asks for, the CPU stages the operator's defaults."""
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}
    if stage is Stage.TRAIN:
        if spec.compute.cpu:
            requests["cpu"] = spec.compute.cpu
        if spec.compute.memory:
            requests["memory"] = limits["memory"] = spec.compute.memory
        if spec.compute.gpus_per_node:
            count = str(spec.compute.gpus_per_node)
            requests[spec.compute.gpu.resource_name] = limits[spec.compute.gpu.resource_name] = count
    else:
        requests, limits = cpu_stage_resources(settings)
    ranks_weights = spec.method.full is not None and spec.method.full.spectrum is not None
    downloads = stage in (Stage.TRAIN, Stage.PUBLISH) or (stage is Stage.PREPARE and ranks_weights)
    storage = spec.compute.ephemeral_storage if downloads else None
    storage = storage or (settings.cpu_stage_ephemeral_storage_request if stage is not Stage.TRAIN else None)
    if storage:
        requests["ephemeral-storage"] = storage
    return {k: v for k, v in (("requests", requests), ("limits", limits)) if v}
