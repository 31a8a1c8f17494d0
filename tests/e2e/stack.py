"""The whole product on the real cluster, as the demo installs it, and what tests ask of it."""

from __future__ import annotations

import json
import subprocess
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from demo import images, install, store
from demo.follow import versions
from demo.target import SYSTEM_NAMESPACE, DemoError, Target, current_target, existing_target
from finetune_cluster.locks import locked
from finetune_cluster.paths import clusters_root

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

BUCKET = "e2e"
TINY_MODEL = f"s3://{BUCKET}/tiny-model"
GPU = "nvidia.com/gpu"
PREFIX = "e2e-"
Job = dict[str, Any]


@dataclass(frozen=True)
class Stack:
    """Cluster and store."""

    target: Target
    bucket: S3Client


class GpuPods(threading.Thread):
    """A watch on a namespace's pods, opened before anything is applied: which of them ever asked for a GPU."""

    def __init__(self, target: Target, namespace: str) -> None:
        super().__init__(daemon=True)
        self.seen: set[str] = set()
        command = target.kubectl_command(
            "get",
            "--raw",
            f"/api/v1/namespaces/{namespace}/pods?watch=true&allowWatchBookmarks=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan",
        )
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.opened = threading.Event()

    def run(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            event = json.loads(line)
            self.opened.set()  # the initial bookmark comes at once, even with no pod there
            for container in (event["object"].get("spec") or {}).get("containers") or []:  # a bookmark has null here
                if GPU in container.get("resources", {}).get("limits", {}):
                    self.seen.add(event["object"]["metadata"]["name"])

    def so_far(self) -> set[str]:
        """Names of pods that asked for a GPU; the watch must have held until now."""
        assert self.is_alive(), "the watch on pods ended, so nothing can be said"
        return self.seen

    def stop(self) -> None:
        """End the watch."""
        self._process.terminate()
        self._process.wait(timeout=10)
        self.join(timeout=10)


@dataclass
class Space:
    """A namespace of one test, with credentials for the store."""

    target: Target
    name: str
    bucket: S3Client
    gpu_pods: GpuPods = field(init=False)

    def __post_init__(self) -> None:
        self.gpu_pods = GpuPods(self.target, self.name)
        self.gpu_pods.start()
        assert self.gpu_pods.opened.wait(30), "the watch on pods did not open"

    def put(self, text: str, suffix: str = "jsonl") -> str:
        """Upload a data file and return its URI."""
        key = f"data/{uuid.uuid4().hex[:12]}/train.{suffix}"
        self.bucket.put_object(Bucket=BUCKET, Key=key, Body=text.encode())
        return f"s3://{BUCKET}/{key}"

    def secret(self, name: str, **values: str) -> None:
        """Create a Secret."""
        metadata = {"name": name, "namespace": self.name}
        self.target.apply({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": values})

    def apply(self, name: str, spec: dict[str, Any]) -> None:
        """``kubectl apply`` of a FineTuneJob."""
        manifest = {
            "apiVersion": "finetune.dev/v1alpha1",
            "kind": "FineTuneJob",
            "metadata": {"name": name},
            "spec": spec,
        }
        self.target.kubectl("apply", "-n", self.name, "-f", "-", stdin=yaml.safe_dump(manifest))

    def patch(self, name: str, spec: dict[str, Any]) -> None:
        """Merge patch of a job's spec."""
        body = json.dumps({"spec": spec})
        self.target.kubectl("patch", "ftj", name, "-n", self.name, "--type=merge", "-p", body)

    def job(self, name: str) -> Job:
        """The job now."""
        return self.target.get("ftj", name, "-n", self.name)

    def until(self, name: str, reached: Callable[[Job], bool], seconds: float, what: str) -> Job:
        """The first version of the job for which ``reached`` holds.

        Raises:
            AssertionError: it finished or time was up before; with the whole status.
        """
        job: Job = {}
        try:
            for job in versions(self.target, self.name, name, seconds):
                if reached(job):
                    return job
        except DemoError:
            pass
        pods = self.target.kubectl("get", "pods", "-n", self.name, "-o", "wide")
        raise AssertionError(
            f"not {what} within {seconds:.0f} s:\n{json.dumps(job.get('status', {}), indent=1)}\n{pods}"
        )

    def until_told(self, name: str, *reasons: str, seconds: int = 60) -> set[str]:
        """The reasons of a job's Events, once all of these are among them: they are posted after the status that they tell of."""
        query = f"watch=true&timeoutSeconds={seconds}&fieldSelector=involvedObject.name={name}"
        command = self.target.kubectl_command("get", "--raw", f"/api/v1/namespaces/{self.name}/events?{query}")
        told: set[str] = set()
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watch:
            assert watch.stdout is not None
            for line in watch.stdout:
                told.add(json.loads(line)["object"]["reason"])
                if told >= set(reasons):
                    watch.terminate()
                    return told
        raise AssertionError(f"no Events {set(reasons) - told} of {name} within {seconds} s, only {told}")

    def pods(self) -> list[dict[str, Any]]:
        """The namespace's pods now."""
        items = self.target.get("pods", "-n", self.name)["items"]
        assert isinstance(items, list)
        return items


def condition(job: Job, kind: str) -> dict[str, Any]:
    """A condition of a job; empty if it has none of that type."""
    conditions = job.get("status", {}).get("conditions", [])
    return next((c for c in conditions if c["type"] == kind), {})


def is_true(job: Job, kind: str) -> bool:
    """Whether a condition is true."""
    return condition(job, kind).get("status") == "True"


def finished(job: Job) -> bool:
    """Whether it ended, well or badly."""
    return is_true(job, "Finished")


def spec_for(data_uri: str, **overrides: Any) -> dict[str, Any]:
    """A small job on the tiny model: CPU, one pretended GPU, two steps."""
    secret = {"name": store.SECRET}
    spec: dict[str, Any] = {
        "model": {"uri": TINY_MODEL, "secretRef": secret},
        "data": {"train": [{"uri": data_uri, "secretRef": secret}]},
        "training": {"useCpu": True, "length": {"steps": 2}, "globalBatchSequences": 4, "maxSequenceTokens": 256},
        "compute": {"gpusPerNode": 1},
        "output": {"uri": f"s3://{BUCKET}/results", "secretRef": secret},
    }
    for key, value in overrides.items():
        spec[key] = {**spec[key], **value} if isinstance(value, dict) and isinstance(spec.get(key), dict) else value
    return spec


def claim_on(space: Space, name: str, folder: Path, mode: str) -> str:
    """A claim on a folder of this machine; the name of its volume."""
    storage = {"accessModes": [mode], "storageClassName": ""}
    volume = f"{space.name}-{name}"
    space.target.apply(
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": volume},
            "spec": {**storage, "capacity": {"storage": "1Gi"}, "hostPath": {"path": str(folder)}},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": name, "namespace": space.name},
            "spec": {**storage, "volumeName": volume, "resources": {"requests": {"storage": "1Gi"}}},
        },
    )
    return volume


def rows(count: int) -> str:
    """Good rows in messages format."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"What is {i} plus {i}?"},
                {"role": "assistant", "content": f"It is {2 * i}."},
            ]
        }
        for i in range(count)
    ]
    return "".join(json.dumps(line) + "\n" for line in lines)


@contextmanager
def whole_stack(folder: Path) -> Iterator[Stack]:
    """Cluster, images, store and operator, as `make demo` sets them up. Of this process alone: another one on this machine waits here.

    ``folder`` is for files of the moment.
    """
    with locked(clusters_root() / ".e2e.tests.lock", "the whole-cluster tests"):
        if existing_target() is None:
            install.cluster_up()
        target = current_target()
        clear_leftovers(target)
        references = images.ensure(target)
        install.install_store(target, references)
        install.install_operator(target, references)
        with store.access(target) as access:
            client = access.client()
            store.ensure_buckets(client)
            store.ensure_bucket(client, BUCKET)
            tiny_model(client, folder / "tiny")
            yield Stack(target, client)


@contextmanager
def new_space(target: Target, bucket: S3Client) -> Iterator[Space]:
    """A namespace that enforces the restricted standard, gone afterwards."""
    name = f"{PREFIX}{uuid.uuid4().hex[:8]}"
    target.apply(install.namespace(name))
    space = Space(target, name, bucket)
    key, secret = store.credentials(target)
    space.secret(
        store.SECRET,
        AWS_ACCESS_KEY_ID=key,
        AWS_SECRET_ACCESS_KEY=secret,
        AWS_ENDPOINT_URL=store.IN_CLUSTER,
        AWS_REGION=store.REGION,
    )
    try:
        yield space
    finally:
        space.gpu_pods.stop()
        target.kubectl("delete", "namespace", name, "--wait=false", "--ignore-not-found")


@contextmanager
def resting_operator(target: Target) -> Iterator[None]:
    """The cluster's operator does nothing meanwhile."""
    operator = ["-n", SYSTEM_NAMESPACE, "-l", "app.kubernetes.io/name=finetune-operator"]
    target.kubectl("scale", "deployment", *operator, "--replicas=0")
    try:
        target.kubectl("wait", "pods", *operator, "--for=delete", "--timeout=120s")
        yield
    finally:
        target.kubectl("scale", "deployment", *operator, "--replicas=1")
        target.kubectl("rollout", "status", "deployment", *operator, "--timeout=120s")


def tiny_model(bucket: S3Client, folder: Path) -> None:
    """Put the tiny model into the bucket."""
    from tests.support.tiny_model import build_tiny_model

    build_tiny_model(folder)
    store.upload_folder(bucket, folder, BUCKET, "tiny-model")


def clear_leftovers(target: Target) -> None:
    """What a run that was killed left: namespaces, whose pods hold GPUs, and a node's label."""
    namespaces = target.kubectl("get", "namespaces", "-o", "name").split()
    for name in (n for n in namespaces if n.startswith(f"namespace/{PREFIX}")):
        target.kubectl("delete", name, "--wait=false")
    if target.cluster_name is not None:
        target.kubectl("label", "nodes", "--all", f"{GPU}.product={install.GPU_PRODUCT}", "--overwrite")
