"""The asynchronous sibling of ``api``: plain dicts over a few connections, patient while the API server restarts."""

import asyncio
import base64
import json
import logging
import ssl
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import yaml

CONNECTIONS = 24
TRIES = 600  # a minute, when the server is away
MERGE_PATCH = "application/merge-patch+json"
APPLY_PATCH = "application/apply-patch+yaml"
BUSY = (429, 500, 503, 504)
log = logging.getLogger(__name__)


class RefusedError(Exception):
    """The API server refused, or did not answer for a minute."""


class AsyncApi:
    """A connection with the client certificate of a kubeconfig. Make it in a running event loop."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        context = ssl.create_default_context(cadata=base64.b64decode(cluster["certificate-authority-data"]).decode())
        with tempfile.NamedTemporaryFile() as file:  # the ssl module reads files only
            file.write(base64.b64decode(user["client-certificate-data"]) + base64.b64decode(user["client-key-data"]))
            file.flush()
            context.load_cert_chain(file.name)
        self._session = aiohttp.ClientSession(
            cluster["server"],
            connector=aiohttp.TCPConnector(ssl=context, limit=CONNECTIONS),
            timeout=aiohttp.ClientTimeout(total=30),
            read_bufsize=1 << 23,  # a line of a watch is a whole object
        )

    async def close(self) -> None:
        """End all requests."""
        await self._session.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        body: object = None,
        params: Mapping[str, str] | None = None,
        content_type: str = "application/json",
        may_fail: tuple[int, ...] = (),
    ) -> dict[str, Any]:
        """The answer, or an empty dict for a status in ``may_fail``."""
        headers = {"Content-Type": content_type}
        data = json.dumps(body) if body is not None else None
        for _ in range(TRIES):
            try:
                async with self._session.request(method, path, data=data, params=params, headers=headers) as response:
                    if response.status in may_fail:
                        return {}
                    if response.status < 400:
                        result: dict[str, Any] = await response.json()
                        return result
                    if response.status not in BUSY:
                        raise RefusedError(f"{method} {path}: {response.status} {await response.text()}")
            except (aiohttp.ClientError, TimeoutError) as error:
                log.info("%s %s: trying again after %r", method, path, error)
            await asyncio.sleep(0.1)  # busy or restarting: nothing tells when it is over
        raise RefusedError(f"{method} {path}: no answer after {TRIES} tries")

    async def events(self, path: str, version: str) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Events of a collection since ``version``, for ever. Type ERROR means that they are lost: list anew and call again."""
        while True:
            try:
                query = {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true"}
                forever = aiohttp.ClientTimeout(total=None)
                async with self._session.get(path, params=query, timeout=forever) as response:
                    if response.status == 410:
                        yield "ERROR", {}
                        return
                    response.raise_for_status()
                    async for line in response.content:
                        event = json.loads(line)
                        yield event["type"], event["object"]
                        if event["type"] == "ERROR":
                            return
                        version = event["object"]["metadata"]["resourceVersion"]
            except (aiohttp.ClientError, TimeoutError) as error:
                log.info("watch of %s broke, going on from %s: %r", path, version, error)
                await asyncio.sleep(0.1)  # the same
