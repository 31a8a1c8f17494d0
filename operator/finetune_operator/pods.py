"""What the pods of all stages have in common: restricted, without API access, with one container."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from finetune_api.failures import HANDED_BACK_EXIT_CODES, INTERRUPTED_EXIT_CODES, PERMANENT_EXIT_CODES
from finetune_api.names import (
    ENV_GRACE_SECONDS,
    ENV_POD_NAME,
    ENV_POD_UID,
    ENV_STAGE,
    WORK_MOUNT,
    Stage,
)
from finetune_api.spec import CombinationRuntime, EnvVar, Runtime
from finetune_operator.settings import Settings

Manifest = dict[str, Any]
RUN_AS = 65532
KILLED = 137
"""SIGKILL, as a container ends that exceeds its memory limit."""
GRACE_SECONDS = 120
"""Of the CPU stages; the training pod's is the spec's, since it must save a checkpoint."""
POD_FIELDS = {ENV_POD_UID: "metadata.uid", ENV_POD_NAME: "metadata.name"}


def restricted_pod(
    stage: Stage,
    image: str,
    runtime: Runtime | CombinationRuntime,
    settings: Settings,
    *,
    env: list[Manifest],
    resources: Manifest,
    volumes: list[Manifest],
    mounts: list[Manifest],
    grace_seconds: int = GRACE_SECONDS,
) -> Manifest:
    """The spec of a stage's pod, as far as all stages agree."""
    pod: Manifest = {
        "restartPolicy": "Never",
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "terminationGracePeriodSeconds": grace_seconds,
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": RUN_AS,
            "runAsGroup": RUN_AS,
            "fsGroup": RUN_AS,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {
                "name": stage.value,
                "image": image,
                "imagePullPolicy": settings.image_pull_policy,
                "args": [stage.value],
                "env": env,
                "resources": resources,
                "volumeMounts": mounts,
                "terminationMessagePolicy": "File",
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"]},
                },
            }
        ],
        "volumes": volumes,
    }
    if runtime.service_account_name:
        pod["serviceAccountName"] = runtime.service_account_name
    if runtime.image_pull_secrets:
        pod["imagePullSecrets"] = [{"name": s.name} for s in runtime.image_pull_secrets]
    return pod


def environment(
    values: dict[str, str], asked: Sequence[EnvVar] | None, defaults: dict[str, str] | None = None
) -> list[Manifest]:
    """A container's environment: ours, which nobody overrides, the pod's own name, then ``defaults`` and what the spec asks for."""
    own = {e.name: e.value for e in asked or [] if e.name not in values and e.name not in POD_FIELDS}
    return [
        *({"name": k, "value": v} for k, v in values.items()),
        *({"name": k, "valueFrom": {"fieldRef": {"fieldPath": v}}} for k, v in POD_FIELDS.items()),
        *({"name": k, "value": v} for k, v in {**(defaults or {}), **own}.items()),
    ]


def scratch_environment(stage: Stage, grace_seconds: int = GRACE_SECONDS) -> dict[str, str]:
    """Which stage it is, and where it may write."""
    return {
        ENV_STAGE: stage.value,
        ENV_GRACE_SECONDS: str(grace_seconds),
        "HOME": f"{WORK_MOUNT}/home",
        "TMPDIR": f"{WORK_MOUNT}/tmp",  # noqa: S108 - below the pod's own emptyDir
        "HF_HOME": f"{WORK_MOUNT}/hf",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


def cpu_stage_resources(settings: Settings) -> tuple[dict[str, str], dict[str, str]]:
    """Requests and limits of a CPU stage: the operator's, whatever the spec says."""
    requests: dict[str, str] = {}
    limits: dict[str, str] = {}
    if settings.cpu_stage_cpu_request:
        requests["cpu"] = settings.cpu_stage_cpu_request
    if settings.cpu_stage_memory_request:
        requests["memory"] = settings.cpu_stage_memory_request
    if settings.cpu_stage_memory_limit:
        limits["memory"] = settings.cpu_stage_memory_limit
    return requests, limits


def failure_rules(stage: Stage) -> list[Manifest]:
    """What the Job controller does about a failed pod; the first rule that fits decides, and none means: it counts.

    A disruption comes first: a drained node's pod may die with any code, and that must not count. (The operator counts the
    evictions and OOMKilled containers that are ignored here; not those of combine and fetch, which only their Jobs count.)
    """
    ends: tuple[int, ...] = PERMANENT_EXIT_CODES
    passes: tuple[int, ...] = INTERRUPTED_EXIT_CODES
    if stage is Stage.TRAIN:
        # It has waited as long as it may hold a GPU for nothing: the operator goes back to prepare.
        ends = tuple(sorted((*ends, *HANDED_BACK_EXIT_CODES)))
    if stage in (Stage.COMBINE, Stage.FETCH):
        passes = tuple(code for code in passes if code != KILLED)
    if stage is Stage.COMBINE:
        # It has waited a minute for what is missing, and said so by ending: the Job's deadline ends that.
        passes = tuple(sorted((*passes, *HANDED_BACK_EXIT_CODES)))

    def on_codes(action: str, codes: tuple[int, ...]) -> Manifest:
        values = {"containerName": stage.value, "operator": "In", "values": list(codes)}
        return {"action": action, "onExitCodes": values}

    return [
        {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
        on_codes("FailJob", ends),
        on_codes("Ignore", passes),
    ]
