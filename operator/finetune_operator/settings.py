"""Settings, from environment variables with the prefix FINETUNE_ (the chart sets them)."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Annotated

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from finetune_api.snapshot import Images


class Settings(BaseSettings):
    """Everything that a deployment decides. Lists are comma-separated."""

    model_config = SettingsConfigDict(env_prefix="FINETUNE_", extra="ignore", frozen=True)

    prepare_image: str = "finetune-prepare:dev"
    trainer_image: str = "finetune-trainer:dev"
    image_pull_policy: str = "IfNotPresent"

    progress_url: str = "https://localhost:8443"
    """As pods reach it: https://<service>.<namespace>.svc:8443."""
    progress_host: str = "0.0.0.0"  # noqa: S104 - pods of every namespace post to it
    progress_port: int = 8443
    tls_cert: Path | None = None
    tls_key: Path | None = None
    ca_file: Path | None = None
    progress_interval_seconds: float = 10.0

    namespaces: Annotated[tuple[str, ...], NoDecode] = ()
    """Empty: the whole cluster."""
    count_free_gpus: bool = True
    """List the pods of all namespaces, at most once a minute, where a job has a use for what is free."""

    leader_election: bool = True
    lease_name: str = "finetune-operator"
    lease_namespace: str = "default"
    lease_duration_seconds: int = 15
    lease_renew_deadline_seconds: int = 10
    lease_retry_seconds: int = 2
    pod_name: str = Field(default_factory=socket.gethostname)

    cpu_stage_cpu_request: str = "500m"
    cpu_stage_memory_request: str = "1Gi"
    cpu_stage_memory_limit: str = "8Gi"
    cpu_stage_ephemeral_storage_request: str = ""

    workers: int = 16
    connections: int = 32
    resync_seconds: float = 300.0
    request_timeout_seconds: float = 15.0
    metrics_port: int = 9090
    health_port: int = 8080
    stall_seconds: float = 120.0
    """Liveness fails when there is work and none was finished for so long."""
    log_level: str = "INFO"

    @field_validator("namespaces", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    @property
    def images(self) -> Images:
        """Default images of the stages."""
        return Images(prepare=self.prepare_image, train=self.trainer_image)

    @property
    def identity(self) -> str:
        """Unique per process: a container that restarts is another candidate."""
        return f"{self.pod_name}_{os.getpid()}_{os.urandom(4).hex()}"

    def ca_bundle(self) -> str:
        """The certificate authority that pods check the progress endpoint against."""
        return self.ca_file.read_text() if self.ca_file is not None else ""
