"""The Job of an AdapterCombination. Its spec cannot change, so what decides the result stands in the pod's environment."""

from __future__ import annotations

from typing import Any

from finetune_api.combination import CombinationSnapshot
from finetune_api.names import ENV_SNAPSHOT, Stage, stage_job_name
from finetune_api.snapshot import JobIdentity
from finetune_api.spec import AdapterCombinationSpec
from finetune_operator.env_snapshot import for_combine
from finetune_operator.manifests import Owner
from finetune_operator.planning.model import JobView
from finetune_operator.pods import cpu_stage_resources, environment, failure_rules, restricted_pod, scratch_environment
from finetune_operator.settings import Settings
from finetune_operator.volumes import combination_volumes

Manifest = dict[str, Any]
MAX_FAILURES = 3
"""Executions that may fail for a reason of their own; what is waited for and what came from outside does not count."""


def combine_job(job: JobView, spec: AdapterCombinationSpec, settings: Settings) -> Manifest:
    """What the operator creates."""
    stage, owner, runtime = Stage.COMBINE, Owner.of(job), spec.runtime
    labels = owner.labels(stage)
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {
            "name": stage_job_name(job.name, job.uid, stage),
            "namespace": job.namespace,
            "labels": labels,
            "ownerReferences": [owner.reference()],
        },
        "spec": {
            "backoffLimit": MAX_FAILURES,
            "completions": 1,
            "parallelism": 1,
            "activeDeadlineSeconds": spec.active_deadline_seconds,
            # A new pod only after the old one is really gone: two executions never write at once.
            "podReplacementPolicy": "Failed",
            "podFailurePolicy": {"rules": failure_rules(stage)},
            "template": {
                "metadata": {
                    "labels": {**(runtime.labels or {}), **labels},
                    "annotations": dict(runtime.annotations or {}),
                },
                "spec": _pod(job, spec, settings),
            },
        },
    }


def _pod(job: JobView, spec: AdapterCombinationSpec, settings: Settings) -> Manifest:
    stage, runtime = Stage.COMBINE, spec.runtime
    identity = JobIdentity(name=job.name, namespace=job.namespace, uid=job.uid, generation=job.generation)
    snapshot = CombinationSnapshot(job=identity, spec=spec)
    values = {**scratch_environment(stage), ENV_SNAPSHOT: for_combine(snapshot)}
    volumes, mounts = combination_volumes(spec)
    requests, limits = cpu_stage_resources(settings)
    if settings.cpu_stage_ephemeral_storage_request:
        requests["ephemeral-storage"] = settings.cpu_stage_ephemeral_storage_request
    pod = restricted_pod(
        stage,
        # Tensors need torch, which only the trainer image has.
        runtime.image or settings.trainer_image,
        runtime,
        settings,
        env=environment(values, runtime.env),
        resources={k: v for k, v in (("requests", requests), ("limits", limits)) if v},
        volumes=volumes,
        mounts=mounts,
    )
    if runtime.node_selector:
        pod["nodeSelector"] = dict(runtime.node_selector)
    if runtime.tolerations:
        pod["tolerations"] = [t.to_json_dict() for t in runtime.tolerations]
    return pod
