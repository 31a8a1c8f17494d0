"""An S3 server in the cluster (SeaweedFS), its credentials, and what the demo puts into it."""

from __future__ import annotations

import base64
import json
import secrets
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import ClientError

from demo.target import NAMESPACE, Target

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

SERVICE = "seaweedfs"
PORT = 8333
NODE_PORT = 30333
SECRET = "s3-credentials"
REGION = "us-east-1"
BUCKETS = ("models", "datasets", "results")
IN_CLUSTER = f"http://{SERVICE}.{NAMESPACE}.svc:{PORT}"


@dataclass(frozen=True)
class Access:
    """How to reach the store from this machine."""

    endpoint: str
    key: str
    secret: str

    def client(self) -> S3Client:
        """A boto3 client; it retries while the server comes up."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.key,
            aws_secret_access_key=self.secret,
            region_name=REGION,
            config=Config(retries={"max_attempts": 10, "mode": "standard"}, s3={"addressing_style": "path"}),
        )


def manifests(image: str, key: str, secret: str) -> list[dict[str, Any]]:
    """Everything the store needs. It runs as the restricted pod security standard wants it."""
    labels = {"app.kubernetes.io/name": SERVICE}
    identities = {
        "identities": [
            {
                "name": "demo",
                "credentials": [{"accessKey": key, "secretKey": secret}],
                "actions": ["Admin", "Read", "Write", "List", "Tagging"],
            }
        ]
    }
    container = {
        "name": SERVICE,
        "image": image,
        "args": [
            "server",
            "-dir=/data",
            "-ip.bind=0.0.0.0",
            "-s3",
            f"-s3.port={PORT}",
            "-s3.config=/etc/seaweedfs/s3.json",
            "-master.volumeSizeLimitMB=1024",
            "-volume.max=64",
            "-volume.minFreeSpace=1",
        ],
        "ports": [{"containerPort": PORT}],
        "readinessProbe": {"tcpSocket": {"port": PORT}, "periodSeconds": 1},
        "resources": {"requests": {"cpu": "50m", "memory": "128Mi"}, "limits": {"memory": "3Gi"}},
        # Go would otherwise let uploads of merged weights grow the heap up to the limit, and be killed.
        "env": [
            {"name": "GOMEMLIMIT", "value": "1GiB"},
            # One volume at a time for each bucket: by default a bucket takes seven of the server's volumes.
            {"name": "WEED_MASTER_VOLUME_GROWTH_COPY_1", "value": "1"},
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        },
        "volumeMounts": [
            {"name": "data", "mountPath": "/data"},
            {"name": "tmp", "mountPath": "/tmp"},
            {"name": "config", "mountPath": "/etc/seaweedfs"},
        ],
    }
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": SECRET, "namespace": NAMESPACE},
            "stringData": {
                "AWS_ACCESS_KEY_ID": key,
                "AWS_SECRET_ACCESS_KEY": secret,
                "AWS_ENDPOINT_URL": IN_CLUSTER,
                "AWS_REGION": REGION,
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": f"{SERVICE}-config", "namespace": NAMESPACE},
            "stringData": {"s3.json": json.dumps(identities)},
        },
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": SERVICE, "namespace": NAMESPACE, "labels": labels},
            "spec": {
                "replicas": 1,
                "strategy": {"type": "Recreate"},
                "selector": {"matchLabels": labels},
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "automountServiceAccountToken": False,
                        "enableServiceLinks": False,
                        "securityContext": {
                            "runAsNonRoot": True,
                            "runAsUser": 65532,
                            "runAsGroup": 65532,
                            "fsGroup": 65532,
                            "seccompProfile": {"type": "RuntimeDefault"},
                        },
                        "containers": [container],
                        "volumes": [
                            {"name": "data", "emptyDir": {}},
                            {"name": "tmp", "emptyDir": {}},
                            {"name": "config", "secret": {"secretName": f"{SERVICE}-config"}},
                        ],
                    },
                },
            },
        },
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": SERVICE, "namespace": NAMESPACE},
            "spec": {
                "type": "NodePort",
                "selector": labels,
                "ports": [{"port": PORT, "targetPort": PORT, "nodePort": NODE_PORT}],
            },
        },
    ]


def install(target: Target, image: str) -> None:
    """Bring the store up. Keys are made once and kept."""
    if target.exists("secret", SECRET, "-n", NAMESPACE):
        key, secret = credentials(target)
    else:
        key, secret = secrets.token_hex(10), secrets.token_hex(20)
    target.apply(*manifests(image, key, secret))
    target.kubectl("rollout", "status", f"deployment/{SERVICE}", "-n", NAMESPACE, "--timeout=180s")


def credentials(target: Target) -> tuple[str, str]:
    """Access key and secret key."""
    data = target.get("secret", SECRET, "-n", NAMESPACE)["data"]
    return tuple(base64.b64decode(data[k]).decode() for k in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"))  # type: ignore[return-value]


def node_endpoint(target: Target) -> str:
    """The store's address on a node: reachable from the machine of a local cluster, and from pods."""
    addresses = target.get("nodes")["items"][0]["status"]["addresses"]
    address = next(a["address"] for a in addresses if a["type"] == "InternalIP")
    return f"http://{address}:{NODE_PORT}"


@contextmanager
def access(target: Target) -> Iterator[Access]:
    """The store from here: on the local cluster by its node port, elsewhere through a port-forward."""
    key, secret = credentials(target)
    if target.cluster_name is not None:
        yield Access(node_endpoint(target), key, secret)
        return
    command = target.kubectl_command("port-forward", "-n", NAMESPACE, f"service/{SERVICE}", f":{PORT}")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as forward:
        assert forward.stdout is not None
        line = forward.stdout.readline()  # "Forwarding from 127.0.0.1:43210 -> 8333"
        port = line.split(" -> ")[0].rpartition(":")[2]
        try:
            yield Access(f"http://127.0.0.1:{port}", key, secret)
        finally:
            forward.terminate()


def upload_folder(client: S3Client, folder: Path, bucket: str, prefix: str) -> int:
    """Upload what is not there yet with the same size; returns how many files were sent."""
    present = {o["Key"]: o["Size"] for o in client.list_objects_v2(Bucket=bucket, Prefix=prefix).get("Contents", [])}
    sent = 0
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        key = f"{prefix}/{path.relative_to(folder)}"
        if present.get(key) != path.stat().st_size:
            client.upload_file(str(path), bucket, key)
            sent += 1
    return sent


def ensure_buckets(client: S3Client) -> None:
    """Create the demo's buckets."""
    for bucket in BUCKETS:
        ensure_bucket(client, bucket)


def ensure_bucket(client: S3Client, bucket: str) -> None:
    """Create a bucket unless it is there."""
    try:
        client.create_bucket(Bucket=bucket)
    except ClientError as error:
        if error.response["Error"]["Code"] not in ("BucketAlreadyExists", "BucketAlreadyOwnedByYou"):
            raise
