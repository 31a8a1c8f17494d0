"""The API server as plain JSON: paths in, dicts out, over kubernetes.aio's connection pool and credentials.

Typed models of the client library cost a third of the throughput (facts/kopf.md), so none are used here.
What may be asked for is what the chart grants (templates/_helpers.tpl): tests/operator/test_rights.py holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote, urlencode
from urllib.request import getproxies

import aiohttp
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_incluster_config, load_kube_config

from finetune_api import API_VERSION, COMBINATION_KIND, COMBINATION_PLURAL, GROUP, KIND, PLURAL, VERSION
from finetune_operator import metrics
from finetune_operator.clock import ServerClock
from finetune_operator.planning.model import DeleteJob

Raw = dict[str, Any]
_OURS = f"/apis/{GROUP}/{VERSION}"
_PLURALS = {KIND: PLURAL, COMBINATION_KIND: COMBINATION_PLURAL}
STATUS_MANAGER = "finetune-operator"
PROGRESS_MANAGER = "finetune-operator-progress"
NODES_PATH = "/api/v1/nodes"
UNDECLARED = "field not declared in schema"
"""The API server's words to an apply of a field that the CRD lacks."""


class ApiError(Exception):
    """An answer that is not a success. ``status`` 0: no answer came (connection, timeout)."""

    def __init__(
        self,
        status: int,
        reason: str,
        message: str,
        method: str,
        path: str,
        fields: tuple[str, ...] = (),
        causes: tuple[str, ...] = (),
    ) -> None:
        super().__init__(f"{method} {path}: {status} {reason}: {message}")
        self.status = status
        self.reason = reason
        self.message = message
        self.fields = fields
        """Fields of the object that the API server's validation names."""
        self.causes = causes
        """Reasons of the causes that it names: NamespaceTerminating, FieldValueInvalid, …"""


async def load_configuration() -> Configuration:
    """In a pod its ServiceAccount, elsewhere KUBECONFIG."""
    configuration = Configuration()
    try:
        load_incluster_config(client_configuration=configuration)
    except ConfigException:
        await load_kube_config(client_configuration=configuration)
    return configuration


class Api:
    """Requests to the API server."""

    def __init__(self, configuration: Configuration, connections: int = 32, timeout_seconds: float = 15.0) -> None:
        configuration.connection_pool_maxsize = connections
        # Where no proxy is set, aiohttp would still look for one in a thread, for every request.
        configuration.client_session_kwargs = {"trust_env": bool(getproxies())}
        self.client = ApiClient(configuration)
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._host = configuration.host.rstrip("/")
        self.clock = ServerClock()
        self.after_write: Callable[[str, str], Awaitable[None]] | None = None
        """Called after every accepted write; tests kill the process here."""

    async def close(self) -> None:
        """Close the connections."""
        await self.client.close()

    async def request(
        self,
        method: str,
        path: str,
        body: Raw | None = None,
        query: dict[str, str] | None = None,
        content_type: str = "application/json",
        read_answer: bool = True,
    ) -> Raw:
        """One request; the answer, or nothing where nobody reads it.

        Raises:
            ApiError: any answer but a 2xx, or none.
        """
        headers = {"Content-Type": content_type, "Accept": "application/json", "User-Agent": "finetune-operator"}
        await self.client.update_params_for_auth(headers, [], ["BearerToken"], path, method, body)
        url = f"{self._host}{path}{'?' + urlencode(query) if query else ''}"
        asked = self.clock.local()
        try:
            response = await self.client.call_api(method, url, headers, body, _request_timeout=self._timeout)
            data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            raise ApiError(0, type(problem).__name__, str(problem), method, path) from problem
        self.clock.heard(response.headers.get("Date"), asked, self.clock.local())
        if not 200 <= response.status < 300:
            raise _error(response.status, response.reason or "", data, method, path)
        if method != "GET":
            metrics.API_WRITES.labels(verb=method.lower(), resource=_resource(path)).inc()
            if self.after_write is not None:
                await self.after_write(method, path)
        answer = json.loads(data) if data and read_answer else {}
        assert isinstance(answer, dict)
        return answer

    # Our own resources

    async def get_finetunejob(self, namespace: str, name: str) -> Raw:
        """A FineTuneJob, fresh."""
        return await self.request("GET", own_path(KIND, namespace, name))

    async def apply_status(
        self, kind: str, namespace: str, name: str, uid: str, status: Raw, manager: str, resource_version: str = ""
    ) -> Raw:
        """Server-side apply on /status. The UID makes it a no to a namesake that was created since (409), and so does the
        resourceVersion, if one is given, to whatever was written since that was read."""
        meta = {"name": name, "namespace": namespace, "uid": uid}
        if resource_version:
            meta["resourceVersion"] = resource_version
        body = {"apiVersion": API_VERSION, "kind": kind, "metadata": meta, "status": status}
        return await self.request(
            "PATCH",
            f"{own_path(kind, namespace, name)}/status",
            body,
            {"fieldManager": manager, "force": "true"},
            "application/apply-patch+yaml",
        )

    async def delete_own(self, kind: str, namespace: str, name: str, uid: str, resource_version: int) -> None:
        """Delete exactly what was seen: one edited since answers 409 and is looked at again."""
        options = {
            "propagationPolicy": "Background",
            "preconditions": {"uid": uid, "resourceVersion": str(resource_version)},
        }
        await self.request("DELETE", own_path(kind, namespace, name), options)

    async def set_finalizers(self, namespace: str, name: str, uid: str, version: int, finalizers: list[str]) -> Raw:
        """Replace the finalizers of exactly what was seen: 409 for one that was written since."""
        meta = {"uid": uid, "resourceVersion": str(version), "finalizers": finalizers}
        path = own_path(KIND, namespace, name)
        return await self.request("PATCH", path, {"metadata": meta}, content_type="application/merge-patch+json")

    # Children

    async def create(self, path: str, body: Raw, read_answer: bool = True) -> Raw:
        """POST an object to a collection."""
        return await self.request("POST", path, body, read_answer=read_answer)

    async def get(self, path: str) -> Raw:
        """GET an object."""
        return await self.request("GET", path)

    async def delete_job(self, namespace: str, delete: DeleteJob) -> Raw:
        """Delete this very Job; it stays until its pods are gone (foreground)."""
        options = {"propagationPolicy": "Foreground", "preconditions": {"uid": delete.uid}}
        return await self.request("DELETE", f"{jobs_path(namespace)}/{quote(delete.name)}", options)

    async def list_all(
        self,
        path: str,
        label_selector: str = "",
        page: int = 500,
        trim: Callable[[Raw], Raw] = lambda item: item,
        field_selector: str = "",
    ) -> tuple[list[Raw], int]:
        """Every object of a collection, of each what ``trim`` leaves of it, and the list's resourceVersion."""
        query = {"limit": str(page)}
        if label_selector:
            query["labelSelector"] = label_selector
        if field_selector:
            query["fieldSelector"] = field_selector
        items: list[Raw] = []
        while True:
            answer = await self.request("GET", path, query=query)
            items.extend(trim(item) for item in answer.get("items") or [])
            meta = answer["metadata"]
            if not meta.get("continue"):
                return items, int(meta.get("resourceVersion") or 0)
            query["continue"] = meta["continue"]

    async def review_token(self, token: str, audience: str) -> Raw:
        """TokenReview; the answer's status."""
        body = {
            "apiVersion": "authentication.k8s.io/v1",
            "kind": "TokenReview",
            "spec": {"token": token, "audiences": [audience]},
        }
        answer = await self.request("POST", "/apis/authentication.k8s.io/v1/tokenreviews", body)
        status = answer.get("status") or {}
        assert isinstance(status, dict)
        return status


def own_path(kind: str, namespace: str | None, name: str = "") -> str:
    """Collection of FineTuneJobs or AdapterCombinations in a namespace or the cluster, or one of them."""
    collection = f"{_OURS}/namespaces/{namespace}/{_PLURALS[kind]}" if namespace else f"{_OURS}/{_PLURALS[kind]}"
    return f"{collection}/{quote(name)}" if name else collection


def jobs_path(namespace: str | None) -> str:
    """Collection of Jobs."""
    return f"/apis/batch/v1/namespaces/{namespace}/jobs" if namespace else "/apis/batch/v1/jobs"


def pods_path(namespace: str | None) -> str:
    """Collection of pods."""
    return f"/api/v1/namespaces/{namespace}/pods" if namespace else "/api/v1/pods"


def configmaps_path(namespace: str) -> str:
    """Collection of ConfigMaps."""
    return f"/api/v1/namespaces/{namespace}/configmaps"


def services_path(namespace: str) -> str:
    """Collection of Services."""
    return f"/api/v1/namespaces/{namespace}/services"


def events_path(namespace: str) -> str:
    """Collection of Events."""
    return f"/api/v1/namespaces/{namespace}/events"


def _resource(path: str) -> str:
    parts = path.strip("/").split("/")
    if "namespaces" in parts:
        rest = parts[parts.index("namespaces") + 2 :]
        return f"{rest[0]}/status" if rest[-1] == "status" else rest[0]
    return parts[-1]


def _error(status: int, reason: str, data: bytes, method: str, path: str) -> ApiError:
    try:
        body = json.loads(data)
        causes = (body.get("details") or {}).get("causes") or []
        fields = tuple(str(c["field"]) for c in causes if c.get("field"))
        reasons = tuple(str(c["reason"]) for c in causes if c.get("reason"))
        words = str(body.get("message") or "")
        if UNDECLARED in words:
            words += " (the CRD is older than this operator: apply the CRDs of its version)"
        return ApiError(status, str(body.get("reason") or reason), words, method, path, fields, reasons)
    except (ValueError, AttributeError):
        return ApiError(status, reason, data[:512].decode(errors="replace"), method, path)
