"""A thin client of the API server for the driver and its tests: plain dicts, server-side apply, and watches instead of polling."""

import base64
import json
import ssl
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import yaml

from finetune_cluster.console import ClusterError

FIELD_MANAGER = "finetune-cluster"
BUSY_SECONDS = 60.0
"""How long a server that answers 429 is asked again: one that has just started does so for custom resources."""
Object = dict[str, Any]


class Api:
    """A connection to an API server as the user of a kubeconfig."""

    def __init__(self, kubeconfig: Path, timeout: float = 10) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        headers = {}
        if "client-certificate-data" in user:
            with tempfile.NamedTemporaryFile() as file:  # the ssl module reads files only
                file.write(
                    base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"])
                )
                file.flush()
                context.load_cert_chain(file.name)
        else:
            headers["Authorization"] = f"Bearer {user['token']}"
        self.server: str = cluster["server"]
        # trust_env off: a proxy of the environment must not see requests to this machine
        self.http = httpx.Client(
            base_url=self.server, verify=context, timeout=timeout, headers=headers, trust_env=False
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.http.close()

    def ready(self) -> bool:
        """Whether the server says that it is ready."""
        try:
            return self.http.get("/readyz", timeout=2).status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def wait_ready(self, seconds: float = 60) -> None:
        """Wait until the server is ready; there is nothing to watch before it is."""
        end = time.monotonic() + seconds
        while not self.ready():
            if time.monotonic() > end:
                raise ClusterError(f"The API server at {self.server} was not ready within {seconds:.0f} s.")
            time.sleep(0.1)

    def get(self, path: str) -> Object:
        """GET."""
        return self._checked(self._send("GET", path))

    def find(self, path: str) -> Object | None:
        """GET, or None if it is not there."""
        response = self._send("GET", path)
        return None if response.status_code == httpx.codes.NOT_FOUND else self._checked(response)

    def create(self, path: str, body: Object) -> Object:
        """POST."""
        return self._checked(self._send("POST", path, json=body))

    def apply(self, path: str, body: Object) -> Object:
        """Server-side apply."""
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        headers = {"Content-Type": "application/apply-patch+yaml"}
        return self._checked(self._send("PATCH", path, params=query, content=json.dumps(body), headers=headers))

    def merge(self, path: str, body: Object) -> Object:
        """JSON merge patch."""
        headers = {"Content-Type": "application/merge-patch+json"}
        return self._checked(self._send("PATCH", path, content=json.dumps(body), headers=headers))

    def delete(self, path: str, **query: str) -> None:
        """DELETE; fine if it is gone already."""
        response = self._send("DELETE", path, params=query)
        if response.status_code != httpx.codes.NOT_FOUND:
            self._checked(response)

    def watch(self, path: str, seconds: float, query: Mapping[str, str] | None = None) -> Iterator[tuple[str, Object]]:
        """Events of a collection, beginning with ADDED for what is there, for ``seconds``.

        A watch that the server ends with an error is begun anew.

        Raises:
            ClusterError: it cannot be, because it was to begin at a version.
        """
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            parameters = {"watch": "true", "timeoutSeconds": str(max(1, int(left))), **(query or {})}
            try:
                with self.http.stream("GET", path, params=parameters, timeout=httpx.Timeout(10, read=left)) as response:
                    response.raise_for_status()
                    for line in response.iter_lines():
                        event = json.loads(line)
                        if event["type"] == "ERROR":
                            why = f"The watch on {path} ended: {event['object'].get('message')}"
                            raise (
                                ClusterError(why) if "resourceVersion" in parameters else httpx.RemoteProtocolError(why)
                            )
                        yield event["type"], event["object"]
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                if isinstance(error, httpx.HTTPStatusError):
                    code = error.response.status_code
                    if code < 500 and code != httpx.codes.TOO_MANY_REQUESTS:
                        raise
                time.sleep(0.1)  # the server is starting or restarting

    def wait(
        self,
        path: str,
        name: str | None,
        condition: Callable[[Object], bool],
        seconds: float,
        what: str,
        query: Mapping[str, str] | None = None,
    ) -> Object:
        """Wait on a watch until an object (of that name) fulfils ``condition`` and return it."""
        last: Object | None = None
        selector = {"fieldSelector": f"metadata.name={name}"} if name else {}
        for kind, item in self.watch(path, seconds, {**selector, **(query or {})}):
            last = item
            if kind != "DELETED" and condition(item):
                return item
        status = json.dumps((last or {}).get("status"), indent=1)
        raise ClusterError(f"Not within {seconds:.0f} s: {what}. Last seen status of {name or path}: {status}")

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        """The answer; one of 429 says that nothing was done, and when to ask again."""
        end = time.monotonic() + BUSY_SECONDS
        while True:
            response = self.http.request(method, path, **arguments)
            if response.status_code != httpx.codes.TOO_MANY_REQUESTS or time.monotonic() > end:
                return response
            time.sleep(float(response.headers.get("Retry-After", 1)))

    @staticmethod
    def _checked(response: httpx.Response) -> Object:
        if response.is_error:
            raise ApiError(response)
        result: Object = response.json()
        return result


class ApiError(ClusterError):
    """The API server refused."""

    def __init__(self, response: httpx.Response) -> None:
        self.code = response.status_code
        try:
            self.message = str(response.json().get("message", response.text))
        except ValueError:
            self.message = response.text
        super().__init__(f"{response.request.method} {response.request.url.path}: {self.code} {self.message}")


def condition(item: Object, kind: str) -> str | None:
    """Status of a condition: "True", "False", "Unknown", or None if it is not there."""
    found = [c["status"] for c in item.get("status", {}).get("conditions", []) if c["type"] == kind]
    return found[0] if found else None
