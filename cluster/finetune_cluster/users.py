"""Kubeconfigs for others than the administrator."""

import base64
from pathlib import Path

import yaml

from finetune_cluster.api import Api
from finetune_cluster.pki import write_kubeconfig


def service_account_kubeconfig(admin: Path, namespace: str, name: str, file: Path, seconds: int = 86400) -> Path:
    """Write a kubeconfig with a token of an existing service account, so that a program can be run with its rights alone."""
    config = yaml.safe_load(admin.read_text())
    cluster = config["clusters"][0]["cluster"]
    with Api(admin) as api:
        request = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {"expirationSeconds": seconds},
        }
        path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{name}/token"
        token = api.create(path, request)["status"]["token"]
    authority = file.with_suffix(".ca.crt")
    authority.write_bytes(base64.b64decode(cluster["certificate-authority-data"]))
    return write_kubeconfig(file, f"{namespace}-{name}", cluster["server"], authority, {"token": token})
