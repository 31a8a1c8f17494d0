"""A scheduler and kubelet by script: real Node and Pod objects on a real API server, and no containers.

It keeps one watch on pods and a task a pod, and writes only when something changes, so that it keeps up with bursts of a thousand jobs.
"""

import asyncio
import contextlib
import inspect
import logging
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self

from finetune_cluster.async_api import MERGE_PATCH, AsyncApi
from finetune_cluster.pod_status import status_after
from finetune_cluster.scripted_nodes import ADDRESS, create_node, now, renew_leases
from finetune_cluster.steps import After, Call, Evicted, Pod, Running, Script, Step, Terminated, Unschedulable, Waiting

GPU = "nvidia.com/gpu"
PODS = "/api/v1/pods"
NOT_FOUND, CONFLICT = 404, 409
Written = Running | Terminated | Evicted | Unschedulable | Waiting
log = logging.getLogger(__name__)
P = ParamSpec("P")


class ScriptedKubelet:
    """Binds every pod to a node of its own making, if its GPUs are free there, and takes it through the steps of ``script``.

    ``script(pod)`` gives the steps; None leaves the pod alone. ``on_delete(pod)`` gives those of a deleted pod that ran, for example
    a hook and ``Terminated(0)``; by default it ends with exit code 143, as by SIGTERM. Then the pod goes.
    ``pods`` counts those seen; ``errors`` holds what went wrong in hooks and requests, for a test to assert that it is empty.
    """

    def __init__(
        self,
        kubeconfig: Path,
        script: Script,
        *,
        on_delete: Script | None = None,
        nodes: int = 1,
        gpus_per_node: int = 8,
        name: str = "scripted",
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self._kubeconfig, self.script, self.on_delete = kubeconfig, script, on_delete
        self._gpus_per_node = gpus_per_node
        self._labels = {"nvidia.com/gpu.product": "Scripted", **(labels or {})}
        self._free = {f"{name}-{number}": gpus_per_node for number in range(1, nodes + 1)}
        self._freed = asyncio.Condition()
        self._api: AsyncApi
        self._background: list[asyncio.Task[None]] = []
        # All by the pod's uid
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._last: dict[str, Pod] = {}
        self._held: dict[str, tuple[str, int]] = {}
        self.pods = 0
        self.errors: list[BaseException] = []

    async def __aenter__(self) -> Self:
        self._api = AsyncApi(self._kubeconfig)
        try:
            resources = {GPU: str(self._gpus_per_node)}
            await asyncio.gather(*(create_node(self._api, node, self._labels, resources) for node in self._free))
            version = await self._list()
            self._background = [
                asyncio.create_task(self._guard(self._watch, version)),
                asyncio.create_task(self._guard(renew_leases, self._api, self._free)),
            ]
        except BaseException:  # __aexit__ is not called now: whatever it was, the connection is closed
            await self._api.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._background, *self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._api.close()

    # What happens to pods

    async def _list(self) -> str:
        listing = await self._api.request("GET", PODS)
        uids = {pod["metadata"]["uid"] for pod in listing["items"]}
        for pod in [pod for uid, pod in self._last.items() if uid not in uids]:
            self._see("DELETED", pod)
        for pod in listing["items"]:
            self._see("ADDED", pod)
        return str(listing["metadata"]["resourceVersion"])

    async def _watch(self, version: str) -> None:
        while True:
            async for kind, item in self._api.events(PODS, version):
                if kind in ("ADDED", "MODIFIED", "DELETED"):
                    self._see(kind, item)
            version = await self._list()

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
            self._tasks[uid] = asyncio.create_task(self._guard(self._remove, pod), name="remove")
        elif uid not in self._tasks and not pod["spec"].get("schedulingGates") and not _ended(pod):
            self.pods += not known
            self._tasks[uid] = asyncio.create_task(self._guard(self._play, pod), name="play")

    async def _guard(self, work: Callable[P, Coroutine[Any, Any, None]], *given: P.args, **named: P.kwargs) -> None:
        try:
            await work(*given, **named)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # of a test's script, so it may be anything: kept for the test to see
            log.exception("scripted kubelet failed")
            self.errors.append(error)

    # One pod

    async def _play(self, pod: Pod) -> None:
        steps = self.script(pod)
        if steps is None:
            return
        try:
            if not await self._take(pod, steps):
                await asyncio.Event().wait()  # stays as it is, with its GPUs, until it is deleted
        finally:
            await self._release(pod["metadata"]["uid"])

    async def _remove(self, pod: Pod) -> None:
        uid = pod["metadata"]["uid"]
        last = self._last.get(uid, pod)
        if not _ended(last) and last["spec"].get("nodeName"):
            ran = last.get("status", {}).get("phase") == "Running"
            steps = (self.on_delete(last) if self.on_delete and ran else None) or ()
            if not await self._take(last, steps):
                await self._write(last, Terminated(143 if ran else 137))
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}}
        await self._api.request("DELETE", _path(pod), body=options, may_fail=(NOT_FOUND, CONFLICT))

    async def _take(self, pod: Pod, steps: Iterable[Step]) -> bool:
        """Take the pod through the steps; says whether it ended."""
        uid = pod["metadata"]["uid"]
        for step in steps:
            if isinstance(step, After):
                await asyncio.sleep(step.seconds)
            elif isinstance(step, Call):
                result = step.hook(self._last.get(uid, pod))
                if inspect.isawaitable(result):
                    await result
            else:
                if uid not in self._held and not pod["spec"].get("nodeName") and not isinstance(step, Unschedulable):
                    await self._bind(pod)
                await self._write(pod, step)
                if isinstance(step, Terminated | Evicted):
                    return True
        return False

    async def _bind(self, pod: Pod) -> None:
        wanted, uid = _gpus(pod), pod["metadata"]["uid"]
        node = self._place(pod, wanted)
        if node is None:
            count = len(self._free)
            await self._write(pod, Unschedulable(f"0/{count} nodes are available: {count} Insufficient {GPU}."))
            async with self._freed:
                while (node := self._place(pod, wanted)) is None:
                    await self._freed.wait()
        self._free[node] -= wanted
        self._held[uid] = (node, wanted)
        binding = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": pod["metadata"]["name"], "uid": uid},
            "target": {"kind": "Node", "name": node},
        }
        await self._api.request("POST", f"{_path(pod)}/binding", body=binding, may_fail=(NOT_FOUND, CONFLICT))

    def _place(self, pod: Pod, gpus: int) -> str | None:
        selector = pod["spec"].get("nodeSelector", {}).items()
        fits = (
            node
            for node, free in self._free.items()
            if free >= gpus and selector <= {**self._labels, "kubernetes.io/hostname": node}.items()
        )
        return next(fits, None)

    async def _release(self, uid: str) -> None:
        node, gpus = self._held.pop(uid, ("", 0))
        if gpus:
            async with self._freed:
                self._free[node] += gpus
                self._freed.notify_all()

    async def _write(self, pod: Pod, step: Written) -> None:
        uid = pod["metadata"]["uid"]
        status = status_after(self._last.get(uid, pod), step, now(), (ADDRESS, _address(uid)))
        body = {"metadata": {"uid": uid}, "status": status}
        path, missing = f"{_path(pod)}/status", (NOT_FOUND, CONFLICT)
        written = await self._api.request("PATCH", path, body=body, content_type=MERGE_PATCH, may_fail=missing)
        if written and uid in self._last:
            self._last[uid] = written


@contextlib.contextmanager
def scripted_kubelet(kubeconfig: Path, script: Script, **options: Any) -> Iterator[ScriptedKubelet]:
    """The same in a thread of its own, for tests that are not asynchronous. Hooks run in that thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(work: Coroutine[Any, Any, Any]) -> Any:
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


def _path(pod: Pod) -> str:
    return f"/api/v1/namespaces/{pod['metadata']['namespace']}/pods/{pod['metadata']['name']}"


def _ended(pod: Pod) -> bool:
    return pod.get("status", {}).get("phase") in ("Succeeded", "Failed")


def _gpus(pod: Pod) -> int:
    return sum(int(c.get("resources", {}).get("limits", {}).get(GPU, 0)) for c in pod["spec"]["containers"])


def _address(uid: str) -> str:
    """An address that nobody answers at, the same for one pod each time."""
    number = hash(uid)
    return f"10.{96 + number % 32}.{number // 32 % 256}.{number // 8192 % 254 + 1}"
