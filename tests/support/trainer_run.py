"""A pod's surroundings on local folders: snapshot, Secrets, volumes, working folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_api import names
from finetune_api.names import Stage
from finetune_api.snapshot import Images, JobIdentity, Snapshot, make_snapshot
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.context import StageContext, load_context

UID = "0a1b2c3d-0000-0000-0000-000000000000"


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with ``changes`` laid over it, object by object."""
    result = dict(base)
    for key, value in changes.items():
        result[key] = (
            merged(result[key], value) if isinstance(value, dict) and isinstance(result.get(key), dict) else value
        )
    return result


def snapshot_of(spec: dict[str, Any], name: str = "job") -> Snapshot:
    """The snapshot that the operator would freeze for a spec as it stands in YAML."""
    identity = JobIdentity(name=name, namespace="team", uid=UID, generation=1)
    images = Images(prepare="prepare:test", train="train:test")
    return make_snapshot(FineTuneJobSpec.model_validate(spec), identity, images, "test")


@dataclass
class Pod:
    """Folders as the operator mounts them, below ``root``. Every context is a new execution unless ``uid`` is kept."""

    root: Path
    environ: dict[str, str] = field(default_factory=dict)

    @property
    def secrets(self) -> Path:
        """Parent of the Secrets' folders, one per slot."""
        return self.root / "secrets"

    @property
    def volumes(self) -> Path:
        """Parent of the claims' folders."""
        return self.root / "pvc"

    @property
    def work(self) -> Path:
        """The emptyDir."""
        return self.root / "work"

    def context(self, spec: dict[str, Any], stage: Stage = Stage.PREPARE, name: str = "job") -> StageContext:
        """The context of a stage."""
        mount = self.root / "snapshot"
        mount.mkdir(parents=True, exist_ok=True)
        (mount / names.SNAPSHOT_KEY).write_text(snapshot_of(spec, name).canonical_json())
        return load_context(
            stage,
            snapshot_dir=mount,
            secrets_dir=self.secrets,
            pvc_dir=self.volumes,
            work_dir=self.work,
            token_dir=self.root / "token",
            environ={names.ENV_POD_UID: "pod-1", **self.environ},
        )
