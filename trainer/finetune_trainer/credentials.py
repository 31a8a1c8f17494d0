"""Credentials from mounted Secrets, read anew at every use, so that a rotated Secret is picked up by a running stage."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from finetune_api.failures import Reason
from finetune_api.spec import RemoteSource
from finetune_trainer.errors import StageError
from finetune_trainer.text import readable

TRACKER_KEYS = (
    "WANDB_API_KEY",
    "WANDB_ENTITY",
    "WANDB_BASE_URL",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "TRACKIO_SERVER_URL",
    "TRACKIO_SPACE_ID",
    "TRACKIO_WRITE_TOKEN",
)
KEYS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_ENDPOINT_URL",
    "AWS_CA_BUNDLE",
    "HF_TOKEN",
    "HF_ENDPOINT",
    "OPENAI_API_KEY",
    *TRACKER_KEYS,
)


@dataclass(frozen=True)
class Credentials:
    """The credentials of one source: where its Secret is mounted, and what the spec sets beside it.

    ``folder`` is None without a secretRef: then boto3's own chain (workload identity) and an anonymous Hub are used.
    """

    slot: str
    secret_name: str | None
    folder: Path | None
    spec_endpoint: str | None = None
    spec_region: str | None = None

    def values(self) -> dict[str, str]:
        """The Secret's known keys as they are now; empty without a secretRef or while the Secret is missing."""
        if self.folder is None:
            return {}
        # The kubelet swaps the link ``..data`` when a Secret changes: reading all keys below its target never mixes
        # the old key id with the new key.
        for _ in range(3):
            link = self.folder / "..data"
            folder = link.resolve() if link.exists() else self.folder
            values = _read_keys(folder)
            if folder == (link.resolve() if link.exists() else self.folder):
                break
        return values

    def require(self, *keys: str) -> dict[str, str]:
        """The Secret's values, with ``keys`` present.

        Raises:
            StageError: SecretMissing, if the Secret or one of the keys is missing; it may still appear.
        """
        values = self.values()
        if self.folder is None:
            return values
        missing = [key for key in keys if not values.get(key)]
        if missing:
            found = [
                f"{name} (empty)" if name in KEYS and name not in values else name
                for name in sorted(_file_names(self.folder))
            ]
            has = f"lacks {', '.join(missing)}; it has {', '.join(found)}" if found else "does not exist or is empty"
            raise StageError(
                Reason.SECRET_MISSING,
                f"Secret {self.secret_name} (for {self.slot}) {has}; expected the keys {', '.join(keys)}",
            )
        return values

    def aws(self) -> tuple[str, str, str | None] | None:
        """Key id, key and session token; None where the pod's own identity is to be used."""
        if self.folder is None:
            return None
        values = self.require("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
        return values["AWS_ACCESS_KEY_ID"], values["AWS_SECRET_ACCESS_KEY"], values.get("AWS_SESSION_TOKEN")

    @property
    def endpoint_url(self) -> str | None:
        """Address of the S3-compatible store; None for AWS."""
        return self.spec_endpoint or self.values().get("AWS_ENDPOINT_URL")

    @property
    def region(self) -> str | None:
        """Region of the store."""
        values = self.values()
        return self.spec_region or values.get("AWS_REGION") or values.get("AWS_DEFAULT_REGION")

    def ca_bundle(self, directory: Path) -> Path | None:
        """The Secret's CA bundle as a file; the value may be PEM text or, as boto3 has it, a path. Text is written to ``directory``."""
        value = self.values().get("AWS_CA_BUNDLE")
        if not value:
            return None
        if "BEGIN CERTIFICATE" not in value:
            return Path(value)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"ca-{self.slot}.pem"
        path.write_text(value + "\n")
        return path

    def hub(self) -> tuple[str | None, str | None]:
        """Token and endpoint of the Hub (None: anonymous, huggingface.co). A Secret for a mirror may hold only HF_ENDPOINT.
        Without a secretRef runtime.env may set both."""
        if self.folder is None:
            return os.environ.get("HF_TOKEN"), self.spec_endpoint or os.environ.get("HF_ENDPOINT")
        values = self.values()
        if not values.get("HF_ENDPOINT"):
            values = self.require("HF_TOKEN")
        return values.get("HF_TOKEN"), self.spec_endpoint or values.get("HF_ENDPOINT")


def load_credentials(secrets_dir: Path, slot: str, source: RemoteSource) -> Credentials:
    """The credentials of ``source``, whose Secret the operator mounts at ``<secrets_dir>/<slot>``."""
    name = source.secret_ref.name if source.secret_ref is not None else None
    return Credentials(slot, name, secrets_dir / slot if name is not None else None, source.endpoint_url, source.region)


def _file_names(folder: Path) -> list[str]:
    """The Secret's keys, ours or not. The kubelet's own links start with two dots."""
    if not folder.is_dir():
        return []
    return [readable(p.name) for p in folder.iterdir() if not p.name.startswith("..")]


def _read_keys(folder: Path) -> dict[str, str]:
    """Values without surrounding white space: ``echo key | base64`` leaves a line break in many Secrets."""
    values = {}
    for key in KEYS:
        try:
            text = (folder / key).read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError):
            continue
        if text:
            values[key] = text
    return values
