"""The operator as a process against a light cluster whose pods follow a script."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from finetune_api.names import LABEL_NAME, LABEL_STAGE, Stage
from finetune_cluster.api import Api
from finetune_cluster.console import ClusterError
from finetune_cluster.light import LightCluster
from finetune_cluster.ports import free_ports
from finetune_cluster.scripted_kubelet import ScriptedKubelet, scripted_kubelet
from finetune_cluster.steps import After, Call, Pod, Running, Step, Terminated
from tests.operator.manifests import success, termination_message
from tests.support.api_proxy import ApiProxy, Plan, ProxyLoop

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 60
Raw = dict[str, Any]


def jobs_of(namespace: str) -> str:
    return f"/apis/batch/v1/namespaces/{namespace}/jobs"


def pods_of(namespace: str) -> str:
    return f"/api/v1/namespaces/{namespace}/pods"


def finetunejobs_of(namespace: str) -> str:
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/finetunejobs"


def combinations_of(namespace: str) -> str:
    return f"/apis/finetune.dev/v1alpha1/namespaces/{namespace}/adaptercombinations"


def stage_of(pod: Pod) -> Stage:
    return Stage(pod["metadata"]["labels"][LABEL_STAGE])


def name_of(pod: Pod) -> str:
    return str(pod["metadata"]["labels"][LABEL_NAME])


def succeed_stage(pod: Pod, after: float = 0.0) -> list[Step]:
    """Run and end well, with the stage's report."""
    return [Running(), After(after), Terminated(0, termination_message(success(stage_of(pod))))]


def until_set(event: threading.Event) -> Call:
    """A step that ends when a test says so."""
    return Call(lambda _: asyncio.to_thread(event.wait, 60))


def condition(job: Raw, kind: str) -> Raw:
    """A condition, or nothing."""
    conditions = (job.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c["type"] == kind), {})


def is_true(job: Raw, kind: str) -> bool:
    return condition(job, kind).get("status") == "True"


@dataclass
class Tls:
    """A certificate for localhost, its key and its authority."""

    cert: Path
    key: Path
    ca: Path


@dataclass
class OperatorProcess:
    """A running operator."""

    process: subprocess.Popen[bytes]
    log: Path
    progress_port: int
    health_port: int
    metrics_port: int

    def kill(self) -> None:
        """kill -9."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def get(self, path: str, port: int | None = None) -> httpx.Response:
        # verify=False: no TLS here, and reading the CA bundle for each request costs more than the request.
        return httpx.get(f"http://127.0.0.1:{port or self.health_port}{path}", timeout=5, trust_env=False, verify=False)

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        lines = self.get("/metrics", self.metrics_port).text.splitlines()
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.split("{")[0].split(" ")[0] == name)

    def until_logged(self, text: str, seconds: float = 60) -> None:
        """What it does and what it logs of it come one after the other."""
        end = time.monotonic() + seconds
        while text not in self.log.read_text():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)

    def wait_ready(self, seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise AssertionError(f"the operator ended:\n{self.log.read_text()[-4000:]}")
            try:
                if self.get("/readyz").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)
        raise AssertionError(f"the operator was not ready:\n{self.log.read_text()[-4000:]}")


@dataclass
class Bench:
    """A light cluster, a script for its pods, and operators."""

    cluster: LightCluster
    folder: Path
    tls: Tls
    namespace: str = "default"
    operators: list[OperatorProcess] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.api: Api = self.cluster.admin()

    def close(self) -> None:
        for operator in self.operators:
            if operator.process.poll() is None:
                operator.kill()
        self.api.http.close()

    # Operators

    def start_operator(self, wait: bool = True, module: str = "finetune_operator", **env: str) -> OperatorProcess:
        """Start an operator process with the chart's way of configuration."""
        ports = free_ports(3)
        log = self.folder / f"operator-{len(self.operators)}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", module], env=self.environment(ports, **env), cwd=ROOT, stdout=out, stderr=out
            )
        operator = OperatorProcess(process, log, *ports)
        self.operators.append(operator)
        if wait:
            operator.wait_ready()
        return operator

    def environment(self, ports: Sequence[int], **env: str) -> dict[str, str]:
        """An operator's environment; ``ports`` are those of progress, health and metrics."""
        return {
            **os.environ,
            "KUBECONFIG": str(self.cluster.kubeconfig),
            "PYTHONPATH": os.pathsep.join(str(ROOT / p) for p in (".", "api", "operator", "cluster")),
            "FINETUNE_PROGRESS_URL": f"https://localhost:{ports[0]}",
            "FINETUNE_PROGRESS_HOST": "127.0.0.1",
            "FINETUNE_PROGRESS_PORT": str(ports[0]),
            "FINETUNE_HEALTH_PORT": str(ports[1]),
            "FINETUNE_METRICS_PORT": str(ports[2]),
            "FINETUNE_TLS_CERT": str(self.tls.cert),
            "FINETUNE_TLS_KEY": str(self.tls.key),
            "FINETUNE_CA_FILE": str(self.tls.ca),
            "FINETUNE_NAMESPACES": self.namespace,
            "FINETUNE_LEASE_NAMESPACE": self.namespace,
            "FINETUNE_LEADER_ELECTION": "false",
            "FINETUNE_POD_NAME": f"operator-{len(self.operators)}",
            **env,
        }

    def until_empty(self) -> None:
        """Wait until nothing is left that jobs had made."""
        self.until_gone(jobs_of(self.namespace))
        self.until_gone(pods_of(self.namespace))
        others = {"fieldSelector": "metadata.name!=kube-root-ca.crt"}
        self.until_gone(f"/api/v1/namespaces/{self.namespace}/configmaps", query=others)

    # FineTuneJobs

    def apply(self, manifest: Raw) -> Raw:
        manifest["metadata"]["namespace"] = self.namespace
        return self.api.create(finetunejobs_of(self.namespace), manifest)

    def job(self, name: str) -> Raw:
        return self.api.get(f"{finetunejobs_of(self.namespace)}/{name}")

    def merge(self, name: str, spec: Raw) -> Raw:
        return self.api.merge(f"{finetunejobs_of(self.namespace)}/{name}", {"spec": spec})

    # AdapterCombinations

    def combine(self, manifest: Raw) -> Raw:
        manifest["metadata"]["namespace"] = self.namespace
        return self.api.create(combinations_of(self.namespace), manifest)

    def until_combined(self, name: str, check: Callable[[Raw], bool], what: str, seconds: float = SECONDS) -> Raw:
        """Wait on a watch until an AdapterCombination is as wanted."""
        return self._until(combinations_of(self.namespace), name, check, what, seconds)

    def until(self, name: str, check: Callable[[Raw], bool], what: str, seconds: float = SECONDS) -> Raw:
        """Wait on a watch until a FineTuneJob is as wanted."""
        return self._until(finetunejobs_of(self.namespace), name, check, what, seconds)

    def _until(self, path: str, name: str, check: Callable[[Raw], bool], what: str, seconds: float) -> Raw:
        last: Raw = {}
        for kind, raw in self.api.watch(path, seconds, {"fieldSelector": f"metadata.name={name}"}):
            last = raw
            if kind != "DELETED" and check(raw):
                return raw
        logs = "\n".join(o.log.read_text()[-3000:] for o in self.operators)
        raise AssertionError(f"not within {seconds} s: {what}\nstatus: {yaml.safe_dump(last.get('status'))}\n{logs}")

    def until_phase(self, name: str, phase: str, seconds: float = SECONDS) -> Raw:
        return self.until(name, lambda j: (j.get("status") or {}).get("phase") == phase, f"phase {phase}", seconds)

    def until_finished(self, name: str, seconds: float = SECONDS) -> Raw:
        return self.until(name, lambda j: is_true(j, "Finished"), "Finished", seconds)

    def until_waiting(self, name: str, reason: str, seconds: float = SECONDS) -> Raw:
        return self.until(
            name,
            lambda j: is_true(j, "Waiting") and condition(j, "Waiting")["reason"] == reason,
            f"Waiting for {reason}",
            seconds,
        )

    def until_gone(self, path: str, seconds: float = SECONDS, query: dict[str, str] | None = None) -> None:
        """Wait until a collection is empty."""
        listing = self.api.http.get(path, params=query or {}).json()
        names: set[str] = {i["metadata"]["name"] for i in listing["items"]}
        if not names:
            return
        # From the list's version on: what is deleted before the watch begins must still be told.
        version = listing["metadata"]["resourceVersion"]
        for kind, raw in self.api.watch(path, seconds, {**(query or {}), "resourceVersion": version}):
            if kind == "DELETED":
                names.discard(raw["metadata"]["name"])
            else:
                names.add(raw["metadata"]["name"])
            if not names:
                return
        raise AssertionError(f"still there after {seconds} s: {names}")

    def stage_jobs(self) -> list[Raw]:
        return list(self.api.get(jobs_of(self.namespace))["items"])

    def pods(self) -> list[Raw]:
        return list(self.api.get(pods_of(self.namespace))["items"])

    def told(self, name: str, *reasons: str, kind: str = "FineTuneJob") -> list[tuple[str, str]]:
        """(reason, message) of the Events of a FineTuneJob, or another kind, once one of each reason is there: they are posted after the status."""
        mine: list[tuple[str, str]] = []
        about = f"involvedObject.name={name},involvedObject.kind={kind}"
        for _, event in self.api.watch(
            f"/api/v1/namespaces/{self.namespace}/events", SECONDS, {"fieldSelector": about}
        ):
            mine.append((event["reason"], event["message"]))
            if set(reasons) <= {reason for reason, _ in mine}:
                return mine
        raise AssertionError(f"no Events {set(reasons) - {reason for reason, _ in mine}} of {name}: {mine}")

    def script(self, steps: Callable[[Pod], Iterable[Step] | None] = succeed_stage, **options: Any) -> Any:
        """A scripted kubelet for this namespace's pods."""
        return _kubelet(self, steps, options)

    def token(self, pod: Raw, audience: str = "progress.finetune.dev") -> str:
        """A token as the kubelet projects it."""
        meta = pod["metadata"]
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenRequest",
            "spec": {
                "audiences": [audience],
                "expirationSeconds": 3600,
                "boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": meta["name"], "uid": meta["uid"]},
            },
        }
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/default/token"
        return str(self.api.create(path, body)["status"]["token"])


@contextmanager
def _kubelet(
    bench: Bench, steps: Callable[[Pod], Iterable[Step] | None], options: dict[str, Any]
) -> Iterator[ScriptedKubelet]:
    def mine(pod: Pod) -> Iterable[Step] | None:
        if pod["metadata"]["namespace"] != bench.namespace or LABEL_STAGE not in (pod["metadata"].get("labels") or {}):
            return None
        return steps(pod)

    name = f"node-{bench.namespace}"
    with scripted_kubelet(bench.cluster.kubeconfig, mine, name=name, **options) as kubelet:
        yield kubelet


@contextmanager
def proxied(bench: Bench, plan: Plan) -> Iterator[ApiProxy]:
    """A proxy before the API server, for operators of this bench."""
    loop = ProxyLoop()
    try:
        with ApiProxy(
            loop, bench.cluster.kubeconfig, bench.cluster.certificate("api-proxy"), bench.folder, plan
        ) as proxy:
            yield proxy
    finally:
        loop.close()


class Recorder:
    """Watches a collection from before a test acts, in a thread. What it has not seen has not been: see :meth:`stop`."""

    def __init__(self, cluster: LightCluster, path: str, seconds: float = 240) -> None:
        self._api = cluster.admin()
        self._path = path
        self._seconds = seconds
        self._news = threading.Condition()
        self._ended = ""
        self.events: list[tuple[str, Raw]] = []
        self._by_namespace: dict[str, list[tuple[str, Raw]]] = defaultdict(list)
        self._seen: dict[str, int] = {}
        """The version of each object that was told of last."""
        # From the list's version on: what happens before the watch is open is told when it is.
        self._version = self._api.get(path)["metadata"]["resourceVersion"]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for event in self._api.watch(self._path, self._seconds, {"resourceVersion": self._version}):
                meta = event[1]["metadata"]
                with self._news:
                    self.events.append(event)
                    self._by_namespace[meta.get("namespace", "")].append(event)
                    self._seen[meta["uid"]] = int(meta["resourceVersion"])
                    self._news.notify_all()
            self._ended = f"its {self._seconds} s were over"
        except (httpx.HTTPError, RuntimeError, ClusterError) as problem:
            self._ended = repr(problem)

    def wait_for(self, check: Callable[[list[tuple[str, Raw]]], bool], seconds: float = SECONDS) -> bool:
        """Whether the events are as wanted within a time."""
        with self._news:
            return self._news.wait_for(lambda: check(self.events), seconds)

    def so_far(self, namespace: str | None = None) -> list[tuple[str, Raw]]:
        """All events until now, or those of a namespace: the watch must have held, and must have caught up with what a list shows.

        Without that, "nothing was created" would hold whenever nothing was seen.
        """
        collection, _, plural = self._path.rpartition("/")
        items = self._api.get(f"{collection}/namespaces/{namespace}/{plural}" if namespace else self._path)["items"]
        there = {(i["metadata"]["uid"], i["metadata"]["resourceVersion"]) for i in items}
        listed = int(self._version)
        there = {(uid, version) for uid, version in there if int(version) > listed}

        def caught_up(_: list[tuple[str, Raw]]) -> bool:
            return all(self._seen.get(uid, 0) >= int(version) for uid, version in there)

        told = self.wait_for(caught_up, 20)
        assert self._thread.is_alive(), f"the watch on {self._path} ended, so nothing can be said: {self._ended}"
        assert told, f"the watch on {self._path} is behind what a list shows, so nothing can be said"
        with self._news:
            return list(self.events if namespace is None else self._by_namespace[namespace])

    def stop(self) -> list[tuple[str, Raw]]:
        """End the watch; all events until now, as :meth:`so_far`."""
        events = self.so_far()
        self._api.http.close()
        return events


def gpu_pods(events: list[tuple[str, Raw]]) -> set[str]:
    """Names of the pods that asked for a GPU."""
    return {raw["metadata"]["name"] for _, raw in events if "nvidia.com/gpu" in str(raw["spec"]["containers"])}


def decode(data: str) -> bytes:
    return base64.b64decode(data)
