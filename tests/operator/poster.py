"""Posts progress as a pod does."""

from __future__ import annotations

import ssl
from typing import Protocol

import httpx

from tests.operator.harness import Bench, stage_of
from tests.operator.manifests import Raw


class Listening(Protocol):
    """An operator, or what keeps one running."""

    progress_port: int


class Poster:
    """Posts as a pod does."""

    def __init__(self, bench: Bench, operator: Listening, pod: Raw, job: str, timeout: float = 20) -> None:
        self._operator = operator
        self._path = f"/v1/namespaces/{bench.namespace}/finetunejobs/{job}"
        self.pod = pod
        self.token = bench.token(pod)
        self.sequence = 0
        context = ssl.create_default_context(cafile=str(bench.tls.ca))
        self.http = httpx.Client(verify=context, timeout=timeout, trust_env=False)

    @property
    def url(self) -> str:
        """Where the operator listens now: one that is started anew has another port."""
        return f"https://localhost:{self._operator.progress_port}{self._path}"

    def post(self, token: str | None = None, **fields: object) -> httpx.Response:
        self.sequence += 1
        body = {
            "executionId": self.pod["metadata"]["uid"],
            "stage": stage_of(self.pod),
            "sequence": self.sequence,
            **fields,
        }
        return self.raw(body, token)

    def raw(self, body: object, token: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {token or self.token}"}
        return self.http.post(f"{self.url}/progress", json=body, headers=headers)
