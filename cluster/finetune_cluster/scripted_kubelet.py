"""A scheduler and kubelet by script: real Node and Pod objects on a real API server, and no containers.

It keeps one watch on pods and a task a pod, and writes only when something changes, so that it keeps up with bursts of a thousand jobs.
"""

import asyncio
import base64
import contextlib
import datetime
import inspect
import json
import logging
import ssl
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import aiohttp
import yaml

from finetune_cluster.pod_status import status_after
from finetune_cluster.steps import After, Call, Evicted, Pod, Running, Script, Step, Terminated, Unschedulable

GPU = "nvidia.com/gpu"
ADDRESS = "127.0.0.1"
LEASE_SECONDS = 10
TRIES = 600  # a minute, when the server is away
MERGE_PATCH = {"Content-Type": "application/merge-patch+json"}
log = logging.getLogger(__name__)


class ScriptedKubelet:
    """Binds every pod to a node of its own making, if its GPUs are free there, and takes it through the steps of ``script``.

    ``script(pod)`` gives the steps; None leaves the pod alone. A deleted pod that ran ends with exit code 143, as by SIGTERM.
    ``pods`` counts those seen; ``errors`` holds what went wrong in hooks and requests, for a test to assert that it is empty.
    """

    def __init__(
        self,
        kubeconfig: Path,
        script: Script,
        *,
        nodes: int = 1,
        gpus_per_node: int = 8,
        name: str = "scripted",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._kubeconfig, self.script, self._gpus_per_node = kubeconfig, script, gpus_per_node
        self._labels = {"nvidia.com/gpu.product": "Scripted", **(labels or {})}
        self._free = {f"{name}-{number}": gpus_per_node for number in range(1, nodes + 1)}
        self._freed = asyncio.Condition()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._last: dict[str, Pod] = {}
        self._held: dict[str, tuple[str, int]] = {}
        self._session: aiohttp.ClientSession
        self._background: list[asyncio.Task[None]] = []
        self._addresses = 0
        self.pods = 0
        self.errors: list[BaseException] = []

    async def __aenter__(self) -> Self:
        self._session = _session(self._kubeconfig)
        try:
            await asyncio.gather(*(self._create_node(node) for node in self._free))
            version = await self._list()
            self._background = [asyncio.create_task(self._watch(version)), asyncio.create_task(self._renew_leases())]
        except BaseException:
            await self._session.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._background, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._session.close()

    # The watch

    async def _list(self) -> str:
        listing = await self._request("GET", "/api/v1/pods", params={"resourceVersion": "0"})
        for pod in listing["items"]:
            self._see("ADDED", pod)
        return str(listing["metadata"]["resourceVersion"])

    async def _watch(self, version: str) -> None:
        while True:
            try:
                async for kind, item in self._events(version):
                    if kind == "ERROR":
                        version = await self._list()
                        break
                    version = item["metadata"]["resourceVersion"]
                    if kind != "BOOKMARK":
                        self._see(kind, item)
            except (aiohttp.ClientError, TimeoutError) as error:
                log.info("watch broken, continuing from %s: %s", version, error)
                await asyncio.sleep(0.1)  # the API server is restarting

    async def _events(self, version: str) -> AsyncIterator[tuple[str, Pod]]:
        query = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true"}
        async with self._session.get(
            "/api/v1/pods", params=query, timeout=aiohttp.ClientTimeout(total=None)
        ) as response:
            if response.status == 410:
                yield "ERROR", {}
                return
            response.raise_for_status()
            async for line in response.content:
                event = json.loads(line)
                yield event["type"], event["object"]

    def _see(self, kind: str, pod: Pod) -> None:
        uid = pod["metadata"]["uid"]
        if kind == "DELETED":
            self._last.pop(uid, None)
            if task := self._tasks.pop(uid, None):
                task.cancel()
            return
        known = uid in self._last
        self._last[uid] = pod
        if "deletionTimestamp" in pod["metadata"]:
            if task := self._tasks.get(uid):
                if task.get_name() == "remove":
                    return
                task.cancel()
            self._tasks[uid] = asyncio.create_task(self._guard(self._remove(pod)), name="remove")
        elif uid not in self._tasks and not pod["spec"].get("schedulingGates") and not _ended(pod):
            self.pods += not known
            self._tasks[uid] = asyncio.create_task(self._guard(self._play(pod)), name="play")

    async def _guard(self, work: Any) -> None:
        try:
            await work
        except asyncio.CancelledError:
            raise
        except Exception as error:
            log.exception("scripted pod failed")
            self.errors.append(error)

    # One pod

    async def _play(self, pod: Pod) -> None:
        steps = self.script(pod)
        if steps is None:
            return
        uid = pod["metadata"]["uid"]
        bound = bool(pod["spec"].get("nodeName"))
        address = self._next_address()
        try:
            for step in steps:
                if isinstance(step, After):
                    await asyncio.sleep(step.seconds)
                elif isinstance(step, Call):
                    result = step.hook(self._last.get(uid, pod))
                    if inspect.isawaitable(result):
                        await result
                else:
                    if not bound and not isinstance(step, Unschedulable):
                        await self._bind(pod)
                        bound = True
                    await self._write(pod, step, address)
                    if isinstance(step, Terminated | Evicted):
                        return
            await asyncio.Event().wait()  # as the last step left it, until it is deleted; holds its GPUs
        finally:
            await self._release(uid)

    async def _bind(self, pod: Pod) -> None:
        wanted, uid = _gpus(pod), pod["metadata"]["uid"]
        node = self._place(pod, wanted)
        if node is None:
            message = f"0/{len(self._free)} nodes are available: {len(self._free)} Insufficient {GPU}."
            await self._write(pod, Unschedulable(message), "")
            async with self._freed:
                while (node := self._place(pod, wanted)) is None:
                    await self._freed.wait()
        self._free[node] -= wanted
        self._held[uid] = (node, wanted)
        target = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod["metadata"]["name"]},
            "target": {"kind": "Node", "name": node},
        }
        await self._request("POST", f"{_path(pod)}/binding", body=target, missing_ok=True)

    def _place(self, pod: Pod, gpus: int) -> str | None:
        selector = pod["spec"].get("nodeSelector", {}).items()
        if not selector <= {**self._labels, "kubernetes.io/hostname": None}.items():
            return None
        return next((node for node, free in self._free.items() if free >= gpus), None)

    async def _release(self, uid: str) -> None:
        node, gpus = self._held.pop(uid, ("", 0))
        if gpus:
            async with self._freed:
                self._free[node] += gpus
                self._freed.notify_all()

    async def _remove(self, pod: Pod) -> None:
        uid = pod["metadata"]["uid"]
        last = self._last.get(uid, pod)
        if not _ended(last) and last["spec"].get("nodeName"):
            started = last.get("status", {}).get("containerStatuses")
            await self._write(last, Terminated(143 if started else 137), last.get("status", {}).get("podIP", ADDRESS))
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}}
        await self._request("DELETE", _path(pod), body=options, missing_ok=True)

    async def _write(self, pod: Pod, step: Running | Terminated | Evicted | Unschedulable | Any, address: str) -> None:
        last = self._last.get(pod["metadata"]["uid"], pod)
        status = status_after(last, step, _now(), (ADDRESS, address))
        body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status}
        written = await self._request("PATCH", f"{_path(pod)}/status", body=body, missing_ok=True)
        if written and pod["metadata"]["uid"] in self._last:
            self._last[pod["metadata"]["uid"]] = written

    def _next_address(self) -> str:
        self._addresses += 1
        return f"10.{96 + self._addresses // 65536 % 32}.{self._addresses // 256 % 256}.{self._addresses % 256}"

    # Nodes

    async def _create_node(self, name: str) -> None:
        resources = {
            "cpu": "256",
            "memory": "2Ti",
            "pods": "10000",
            "ephemeral-storage": "10Ti",
            GPU: str(self._gpus_per_node),
        }
        now = _now()
        ready = {
            "type": "Ready",
            "status": "True",
            "reason": "Scripted",
            "lastHeartbeatTime": now,
            "lastTransitionTime": now,
        }
        status = {
            "capacity": resources,
            "allocatable": resources,
            "conditions": [ready],
            "addresses": [{"type": "InternalIP", "address": ADDRESS}, {"type": "Hostname", "address": name}],
            "nodeInfo": {"kubeletVersion": "v1.34.4", "operatingSystem": "linux", "architecture": "amd64"}
            | dict.fromkeys(
                (
                    "machineID",
                    "systemUUID",
                    "bootID",
                    "kernelVersion",
                    "osImage",
                    "containerRuntimeVersion",
                    "kubeProxyVersion",
                ),
                "",
            ),
        }
        labels = {"kubernetes.io/hostname": name, **self._labels}
        node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels}, "status": status}
        await self._request("POST", "/api/v1/nodes", body=node, exists_ok=True)
        await self._renew_lease(name)

    async def _renew_leases(self) -> None:
        while True:  # or the node controller takes the nodes for lost and deletes their pods
            await asyncio.sleep(LEASE_SECONDS)
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                await asyncio.gather(*(self._renew_lease(name) for name in self._free))

    async def _renew_lease(self, node: str) -> None:
        spec = {"holderIdentity": node, "leaseDurationSeconds": 40, "renewTime": _now(micro=True)}
        lease = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": node}, "spec": spec}
        path = f"/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/{node}"
        headers = {"Content-Type": "application/apply-patch+yaml"}
        await self._request(
            "PATCH", path, body=lease, headers=headers, params={"fieldManager": "scripted-kubelet", "force": "true"}
        )

    async def _request(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        params: Mapping[str, str] | None = None,
        headers: Mapping[str, str] = MERGE_PATCH,
        missing_ok: bool = False,
        exists_ok: bool = False,
    ) -> dict[str, Any]:
        kind = headers if method == "PATCH" else {"Content-Type": "application/json"}
        for _ in range(TRIES):
            try:
                data = json.dumps(body) if body is not None else None
                async with self._session.request(method, path, data=data, params=params, headers=kind) as response:
                    if (missing_ok and response.status in (404, 409)) or (exists_ok and response.status == 409):
                        return {}
                    busy = response.status in (429, 500, 503, 504)
                    if response.status >= 400 and not busy:
                        raise ScriptError(f"{method} {path}: {response.status} {await response.text()}")
                    if not busy:
                        result: dict[str, Any] = await response.json()
                        return result
            except (aiohttp.ClientError, TimeoutError) as error:
                log.info("%s %s: trying again after %r", method, path, error)
            await asyncio.sleep(0.1)  # the API server is restarting or busy
        raise ScriptError(f"{method} {path}: no answer after {TRIES} tries")


class ScriptError(Exception):
    """The API server refused what the script made us write."""


@contextlib.contextmanager
def scripted_kubelet(kubeconfig: Path, script: Script, **options: Any) -> Iterator[ScriptedKubelet]:
    """The same in a thread of its own, for tests that are not asynchronous. Hooks run in that thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(60)

    async def begin() -> ScriptedKubelet:
        return await ScriptedKubelet(kubeconfig, script, **options).__aenter__()

    try:
        kubelet: ScriptedKubelet = wait(begin())
        try:
            yield kubelet
        finally:
            wait(kubelet.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _session(kubeconfig: Path) -> aiohttp.ClientSession:
    config = yaml.safe_load(kubeconfig.read_text())
    cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
    context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
    with tempfile.NamedTemporaryFile() as file:
        file.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
        file.flush()
        context.load_cert_chain(file.name)
    # read_bufsize: a line of the watch is a whole pod
    connector = aiohttp.TCPConnector(ssl=context, limit=24)
    return aiohttp.ClientSession(
        cluster["server"], connector=connector, read_bufsize=1 << 23, timeout=aiohttp.ClientTimeout(total=30)
    )


def _path(pod: Pod) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _ended(pod: Pod) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _gpus(pod: Pod) -> int:
    return sum(int(c.get("resources", {}).get("limits", {}).get(GPU, 0)) for c in pod["spec"]["containers"])


def _now(*, micro: bool = False) -> str:
    now = datetime.datetime.now(datetime.UTC)
    return now.strftime("%Y-%m-%dT%H:%M:%S.%fZ" if micro else "%Y-%m-%dT%H:%M:%SZ")


__all__ = ["ScriptedKubelet", "Step", "scripted_kubelet"]
