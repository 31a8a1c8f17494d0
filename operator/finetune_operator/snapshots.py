"""The run snapshots: created once, then read from their ConfigMaps, whose content is the truth."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version

from pydantic import ValidationError

from finetune_api.names import SNAPSHOT_KEY, snapshot_name
from finetune_api.snapshot import JobIdentity, NodeGpu, Snapshot, make_snapshot
from finetune_operator.client import Api, ApiError, Raw, configmaps_path
from finetune_operator.gpus import NodeGpus
from finetune_operator.manifests import Owner, snapshot_config_map
from finetune_operator.observe import owner_uid
from finetune_operator.planning.model import JobView, SnapshotRecord
from finetune_operator.settings import Settings


def operator_version() -> str:
    """Version of the installed distribution."""
    try:
        return version("finetune-operator")
    except PackageNotFoundError:
        return "0.0.0"


class Conflict(Exception):
    """An object that we need exists and belongs to something else."""


class Snapshots:
    """By UID of the FineTuneJob, in memory."""

    def __init__(self, api: Api, settings: Settings) -> None:
        self._api = api
        self._settings = settings
        self.gpus = NodeGpus(api)
        self._known: dict[str, SnapshotRecord] = {}
        self._version = operator_version()
        self._bundle: tuple[int, str] | None = None

    def forget(self, uid: str) -> None:
        """The job is gone."""
        self._known.pop(uid, None)

    def known(self, uid: str) -> SnapshotRecord | None:
        """The snapshot, if this process has seen it."""
        return self._known.get(uid)

    def _authority(self) -> str:
        """The CA bundle; read again only when its file changed."""
        file = self._settings.ca_file
        stamp = file.stat().st_mtime_ns if file is not None else 0
        if self._bundle is None or self._bundle[0] != stamp:
            self._bundle = stamp, self._settings.ca_bundle()
        return self._bundle[1]

    async def find(self, job: JobView) -> SnapshotRecord | None:
        """The stored snapshot, or None if there is none."""
        try:
            return self._remember(job, await self._api.get(self._path(job)))
        except ApiError as problem:
            if problem.status == 404:
                return None
            raise

    async def node_gpus(self, job: JobView) -> list[NodeGpu] | None:
        """What a job's training pod may land on; None where that is not known, or need not be.

        Raises:
            ApiError: the API server refused, or could not be reached.
        """
        assert job.spec is not None
        return await self.gpus.for_job(job.spec)

    async def create(self, job: JobView, node_gpus: list[NodeGpu] | None) -> SnapshotRecord:
        """Freeze a job, once: what is there already stays as it is.

        Raises:
            Conflict: the ConfigMap belongs to something else.
            ApiError: the API server refused, or could not be reached.
        """
        snapshot = self.make(job, node_gpus)
        text = snapshot.canonical_json()
        digest = hashlib.sha256(text.encode()).hexdigest()
        body = snapshot_config_map(Owner.of(job), text, digest, self._authority())
        try:
            await self._api.create(configmaps_path(job.namespace), body, read_answer=False)
        except ApiError as problem:
            if problem.status != 409:
                raise
            return self._remember(job, await self._api.get(self._path(job)))
        record = SnapshotRecord(snapshot, digest)
        self._known[job.uid] = record
        return record

    def make(self, job: JobView, node_gpus: list[NodeGpu] | None = None) -> Snapshot:
        """What a job would be frozen to now."""
        assert job.spec is not None
        identity = JobIdentity(name=job.name, namespace=job.namespace, uid=job.uid, generation=job.generation)
        return make_snapshot(job.spec, identity, self._settings.images, self._version, node_gpus)

    def _remember(self, job: JobView, raw: Raw) -> SnapshotRecord:
        if owner_uid(raw["metadata"]) != job.uid:
            raise Conflict(f"ConfigMap {raw['metadata']['name']} exists and is not controlled by this FineTuneJob.")
        text = str((raw.get("data") or {}).get(SNAPSHOT_KEY, ""))
        try:
            # A newer version may have frozen more than this one knows; pods read the text itself, and the digest is the text's.
            snapshot = Snapshot.model_validate_json(text, extra="ignore")
        except ValidationError as problem:
            raise Conflict(
                f"ConfigMap {raw['metadata']['name']} holds no readable run snapshot: {problem}"
            ) from problem
        record = SnapshotRecord(snapshot, hashlib.sha256(text.encode()).hexdigest())
        self._known[job.uid] = record
        return record

    def _path(self, job: JobView) -> str:
        return f"{configmaps_path(job.namespace)}/{snapshot_name(job.name, job.uid)}"
