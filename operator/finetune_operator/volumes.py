"""Pure builders of a stage pod's volumes: snapshot, token, scratch space, and the Secrets and claims of what it reads."""

from __future__ import annotations

from typing import Any

from finetune_api.names import (
    CACHE_MOUNT,
    INITIAL_ADAPTER_SLOT,
    JUDGE_SLOT,
    MODEL_SLOT,
    OUTPUT_SLOT,
    PVC_MOUNT,
    SECRETS_MOUNT,
    SNAPSHOT_MOUNT,
    TOKEN_AUDIENCE,
    TOKEN_KEY,
    TOKEN_MOUNT,
    WORK_MOUNT,
    Stage,
    adapter_slot,
    held_out_slot,
    prompts_slot,
    task_slot,
    tracker_slot,
    train_slot,
)
from finetune_api.spec import AdapterCombinationSpec, FineTuneJobSpec, LocalObjectReference, RemoteSource
from finetune_api.uris import PvcLocation, parse_uri

Manifest = dict[str, Any]
TOKEN_SECONDS = 3600


def volumes_and_mounts(
    spec: FineTuneJobSpec, stage: Stage, snapshot_config_map: str
) -> tuple[list[Manifest], list[Manifest]]:
    """Volumes of the pod and mounts of its container."""
    if stage is Stage.CLEANUP:
        return _cleanup_volumes(spec)
    token = {"audience": TOKEN_AUDIENCE, "expirationSeconds": TOKEN_SECONDS, "path": TOKEN_KEY}
    volumes: list[Manifest] = [
        {"name": "snapshot", "configMap": {"name": snapshot_config_map}},
        {"name": "token", "projected": {"sources": [{"serviceAccountToken": token}]}},
    ]
    mounts: list[Manifest] = [
        {"name": "snapshot", "mountPath": SNAPSHOT_MOUNT, "readOnly": True},
        {"name": "token", "mountPath": TOKEN_MOUNT, "readOnly": True},
    ]
    _add_scratch(volumes, mounts)
    if stage is Stage.TRAIN:
        volumes.append({"name": "shm", "emptyDir": {"medium": "Memory"}})
        mounts.append({"name": "shm", "mountPath": "/dev/shm"})  # noqa: S108 - shared memory of data loaders and NCCL
    _add_secrets(volumes, mounts, _secrets(spec, stage))
    if spec.model.cache is not None and (stage is not Stage.PUBLISH or spec.publishes_model):
        volumes.append({"name": "model-cache", "persistentVolumeClaim": {"claimName": spec.model.cache.claim_name}})
        mounts.append({"name": "model-cache", "mountPath": CACHE_MOUNT})
    _add_claims(volumes, mounts, _uris(spec, stage))
    return volumes, mounts


def _cleanup_volumes(spec: FineTuneJobSpec) -> tuple[list[Manifest], list[Manifest]]:
    """Nothing that may be gone together with the FineTuneJob: neither its snapshot nor a claim; and it reports to nobody."""
    volumes: list[Manifest] = []
    mounts: list[Manifest] = []
    _add_scratch(volumes, mounts)
    if spec.output.secret_ref is not None:
        _add_secrets(volumes, mounts, {OUTPUT_SLOT: spec.output.secret_ref.name})
    return volumes, mounts


def combination_volumes(spec: AdapterCombinationSpec) -> tuple[list[Manifest], list[Manifest]]:
    """Of an AdapterCombination's pod: what it is to do stands in its environment, and it reports to nobody."""
    volumes: list[Manifest] = []
    mounts: list[Manifest] = []
    _add_scratch(volumes, mounts)
    slots: dict[str, RemoteSource] = {OUTPUT_SLOT: spec.output}
    slots |= {adapter_slot(i): adapter for i, adapter in enumerate(spec.adapters)}
    _add_secrets(volumes, mounts, {slot: s.secret_ref.name for slot, s in slots.items() if s.secret_ref is not None})
    _add_claims(volumes, mounts, [adapter.uri for adapter in spec.adapters])
    return volumes, mounts


def _add_scratch(volumes: list[Manifest], mounts: list[Manifest]) -> None:
    volumes += [{"name": "work", "emptyDir": {}}, {"name": "tmp", "emptyDir": {}}]
    mounts += [
        {"name": "work", "mountPath": WORK_MOUNT},
        {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - an emptyDir of the pod's own
    ]


def _add_claims(volumes: list[Manifest], mounts: list[Manifest], uris: list[str]) -> None:
    locations = [parse_uri(uri) for uri in uris]
    claims = sorted({location.claim for location in locations if isinstance(location, PvcLocation)})
    for index, claim in enumerate(claims):
        volumes.append({"name": f"pvc-{index}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}})
        mounts.append({"name": f"pvc-{index}", "mountPath": f"{PVC_MOUNT}/{claim}", "readOnly": True})


def _add_secrets(volumes: list[Manifest], mounts: list[Manifest], secrets: dict[str, str]) -> None:
    for slot, secret in secrets.items():
        # Optional: the pod starts without it, reports SecretMissing and goes on when it appears; mode: readable by fsGroup.
        volumes.append(
            {"name": f"secret-{slot}", "secret": {"secretName": secret, "optional": True, "defaultMode": 0o440}}
        )
        mounts.append({"name": f"secret-{slot}", "mountPath": f"{SECRETS_MOUNT}/{slot}", "readOnly": True})


def _secrets(spec: FineTuneJobSpec, stage: Stage) -> dict[str, str]:
    """Slot → Secret, for the sources that this stage reads or writes, and the trackers that it checks or tells."""
    slots: dict[str, RemoteSource] = {MODEL_SLOT: spec.model, OUTPUT_SLOT: spec.output}
    if stage is Stage.PREPARE:
        if spec.model.initial_adapter is not None:
            slots[INITIAL_ADAPTER_SLOT] = spec.model.initial_adapter
        slots |= {train_slot(i): source for i, source in enumerate(spec.data.train)}
        slots |= {held_out_slot(i): source for i, source in enumerate(spec.data.held_out.sources or [])}
        slots |= {prompts_slot(i): source for i, source in enumerate(spec.evaluation.generation.sources or [])}
        slots |= {task_slot(i): task for i, task in enumerate(spec.evaluation.tasks or [])}
    references: dict[str, LocalObjectReference | None] = {slot: source.secret_ref for slot, source in slots.items()}
    if stage in (Stage.PREPARE, Stage.TRAIN):
        references |= {tracker_slot(tracker.type): tracker.secret_ref for tracker in spec.trackers or []}
    elif stage is Stage.PUBLISH and spec.evaluation.judge is not None:
        references[JUDGE_SLOT] = spec.evaluation.judge.secret_ref
    return {slot: reference.name for slot, reference in references.items() if reference is not None}


def _uris(spec: FineTuneJobSpec, stage: Stage) -> list[str]:
    uris = [spec.model.uri]
    if stage is Stage.PREPARE:
        uris += [spec.model.initial_adapter.uri] if spec.model.initial_adapter is not None else []
        beside = (*(spec.data.held_out.sources or []), *(spec.evaluation.generation.sources or []))
        uris += [s.uri for s in (*spec.data.train, *beside)]
    return uris
