"""What every stage is given: the frozen run, its folders, its stores and its way to report."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from finetune_api import names
from finetune_api.combination import CombinationSnapshot
from finetune_api.names import Stage
from finetune_api.snapshot import Snapshot
from finetune_api.spec import RemoteSource
from finetune_trainer.credentials import Credentials, load_credentials
from finetune_trainer.reporter import Reporter
from finetune_trainer.s3 import S3Store, connect


class PodContext(Protocol):
    """What a stage has of whichever kind of resource."""

    @property
    def snapshot(self) -> Snapshot | CombinationSnapshot:
        """What it is to do."""

    @property
    def execution_id(self) -> str:
        """The pod's UID."""

    @property
    def work_dir(self) -> Path:
        """The pod's own space."""

    @property
    def pvc_dir(self) -> Path:
        """Where claims are mounted."""

    @property
    def reporter(self) -> Reporter:
        """Tells the operator."""

    def credentials(self, slot: str, source: RemoteSource) -> Credentials:
        """The credentials of one source of the spec."""


@dataclass(frozen=True)
class StageContext:
    """Input of a stage. Nothing in it decides anything."""

    snapshot: Snapshot
    stage: Stage
    execution_id: str
    work_dir: Path
    secrets_dir: Path
    pvc_dir: Path
    reporter: Reporter
    cache_dir: Path = Path(names.CACHE_MOUNT)

    def output_store(self) -> S3Store:
        """The job's output folder: ``<output.uri>/<name>-<uid8>``."""
        credentials = self.credentials(names.OUTPUT_SLOT, self.snapshot.spec.output)
        return connect(self.snapshot.output, credentials, self.work_dir)

    def workspace_store(self) -> S3Store:
        """Prepared data and stage results; same store and credentials as the output."""
        credentials = self.credentials(names.OUTPUT_SLOT, self.snapshot.spec.output)
        return connect(self.snapshot.workspace, credentials, self.work_dir)

    def credentials(self, slot: str, source: RemoteSource) -> Credentials:
        """The credentials of one source of the spec."""
        return load_credentials(self.secrets_dir, slot, source)


def load_context(
    stage: Stage,
    *,
    snapshot_dir: Path = Path(names.SNAPSHOT_MOUNT),
    secrets_dir: Path = Path(names.SECRETS_MOUNT),
    pvc_dir: Path = Path(names.PVC_MOUNT),
    cache_dir: Path = Path(names.CACHE_MOUNT),
    work_dir: Path = Path(names.WORK_MOUNT),
    token_dir: Path = Path(names.TOKEN_MOUNT),
    environ: Mapping[str, str] = os.environ,
) -> StageContext:
    """Read what the operator mounted and set. The execution id is the pod's UID: one pod, one execution."""
    text = environ.get(names.ENV_SNAPSHOT) or (snapshot_dir / names.SNAPSHOT_KEY).read_bytes()
    snapshot = Snapshot.model_validate_json(text)
    execution_id = environ.get(names.ENV_POD_UID) or str(uuid.uuid4())
    reporter = Reporter(
        stage,
        execution_id,
        # Of several pods that train together the first one reports.
        url=environ.get(names.ENV_ENDPOINT) if environ.get(names.ENV_NODE_INDEX, "0") == "0" else None,
        token_file=token_dir / names.TOKEN_KEY,
        ca_file=snapshot_dir / names.CA_KEY,
    )
    work_dir.mkdir(parents=True, exist_ok=True)
    return StageContext(snapshot, stage, execution_id, work_dir, secrets_dir, pvc_dir, reporter, cache_dir)


@dataclass(frozen=True)
class CombineContext:
    """Input of the combine stage."""

    snapshot: CombinationSnapshot
    execution_id: str
    work_dir: Path
    secrets_dir: Path
    pvc_dir: Path
    reporter: Reporter

    def output_store(self) -> S3Store:
        """The combination's output folder: ``<output.uri>/<name>-<uid8>``."""
        credentials = self.credentials(names.OUTPUT_SLOT, self.snapshot.spec.output)
        return connect(self.snapshot.output, credentials, self.work_dir)

    def credentials(self, slot: str, source: RemoteSource) -> Credentials:
        """The credentials of one source of the spec."""
        return load_credentials(self.secrets_dir, slot, source)


def load_combine_context(
    *,
    secrets_dir: Path = Path(names.SECRETS_MOUNT),
    pvc_dir: Path = Path(names.PVC_MOUNT),
    work_dir: Path = Path(names.WORK_MOUNT),
    environ: Mapping[str, str] = os.environ,
) -> CombineContext:
    """Read what the operator mounted and set. This stage posts no progress: how it ended stands in its termination message."""
    snapshot = CombinationSnapshot.model_validate_json(environ[names.ENV_SNAPSHOT])
    execution_id = environ.get(names.ENV_POD_UID) or str(uuid.uuid4())
    work_dir.mkdir(parents=True, exist_ok=True)
    return CombineContext(snapshot, execution_id, work_dir, secrets_dir, pvc_dir, Reporter(Stage.COMBINE, execution_id))


def open_context(stage: Stage) -> PodContext:
    """What a pod of this stage was given."""
    return load_combine_context() if stage is Stage.COMBINE else load_context(stage)
