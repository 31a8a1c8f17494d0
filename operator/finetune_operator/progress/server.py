"""The HTTPS server that pods post to. Any replica answers; only what is accepted is written."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from finetune_api import KIND
from finetune_api.progress import ProgressPost
from finetune_operator import metrics
from finetune_operator.cache import Cache, Key
from finetune_operator.client import Api, Raw
from finetune_operator.handlers import Informer
from finetune_operator.pace import Pace
from finetune_operator.progress.auth import Authenticator, Caller, Refused
from finetune_operator.progress.protocol import finite, from_kubeflow
from finetune_operator.progress.writer import ProgressWriter
from finetune_operator.settings import Settings

logger = logging.getLogger(__name__)
MAX_BODY_BYTES = 64 * 1024
RELOAD_SECONDS = 30.0
PREFIX = "/v1/namespaces/{namespace}/finetunejobs/{name}"


class ProgressServer:
    """``POST …/progress`` takes a ProgressPost; ``POST …`` itself speaks transformers' KubeflowCallback."""

    def __init__(
        self, api: Api, cache: Cache, informer: Informer, pace: Pace, settings: Settings, leading: Callable[[], bool]
    ) -> None:
        self._cache = cache
        self._informer = informer
        self._settings = settings
        self._leading = leading
        self._auth = Authenticator(api, cache)
        self._writer = ProgressWriter(api, self._auth, pace, self._wrote)
        self._runner: web.AppRunner | None = None
        self._reloader: asyncio.Future[None] | None = None

    async def start(self) -> None:
        """Listen."""
        app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[_answers])
        app.router.add_post(f"{PREFIX}/progress", self._progress)
        app.router.add_post(PREFIX, self._kubeflow)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        context = None
        cert, key = self._settings.tls_cert, self._settings.tls_key
        if cert is not None and key is not None:
            context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            context.load_cert_chain(cert, key)
            self._reloader = asyncio.ensure_future(_reload(context, cert, key))
        else:
            logger.warning("No certificate: the progress endpoint speaks plain HTTP. Tokens travel in the clear.")
        site = web.TCPSite(
            self._runner, self._settings.progress_host, self._settings.progress_port, ssl_context=context
        )
        await site.start()

    async def stop(self) -> None:
        """Stop listening."""
        if self._reloader is not None:
            self._reloader.cancel()
        if self._runner is not None:
            await self._runner.cleanup()

    async def _progress(self, request: web.Request) -> web.Response:
        caller = await self._caller(request)
        try:
            post = finite(ProgressPost.model_validate(await _json(request), extra="ignore"))
        except ValidationError as problem:
            first = problem.errors(include_url=False)[0]
            place = ".".join(str(p) for p in first["loc"])
            raise Refused(422, "Invalid", f"{place}: {first['msg']}") from problem
        if post.execution_id != caller.pod_uid:
            raise Refused(403, "Forbidden", "executionId is not the UID of the pod that posts")
        if post.stage is not caller.stage:
            raise Refused(403, "Forbidden", f"this pod's stage is {caller.stage}, not {post.stage}")
        recorded = await self._writer.submit(caller, post)
        return web.json_response({"accepted": True, "recorded": recorded})

    async def _kubeflow(self, request: web.Request) -> web.Response:
        caller = await self._caller(request)
        try:
            post = from_kubeflow(await _json(request), caller.pod_uid, caller.stage, 0)
        except ValueError as problem:
            raise Refused(422, "Invalid", str(problem)) from problem
        await self._writer.submit(caller, post, sequenced=False)
        return web.json_response({"accepted": True})

    async def _caller(self, request: web.Request) -> Caller:
        identity = await self._auth.identify(request.headers.get("Authorization", ""))
        key = Key(request.match_info["namespace"], request.match_info["name"])
        return await self._auth.authorize(identity, key)

    def _wrote(self, answer: Raw) -> None:
        """The leader sees its own write at once; a standby has no cache to keep."""
        if not self._leading():
            return
        key = self._cache.put(KIND, answer)
        if key is not None:
            self._informer.enqueue(key)


async def _json(request: web.Request) -> Any:
    try:
        return json.loads(await request.read())
    except ValueError as problem:
        raise Refused(422, "Invalid", f"the body is not JSON: {problem}") from problem


@web.middleware
async def _answers(request: web.Request, handler: Any) -> web.StreamResponse:
    try:
        response: web.StreamResponse = await handler(request)
    except Refused as refused:
        response = web.json_response({"reason": refused.reason, "message": refused.message}, status=refused.status)
    except web.HTTPException as problem:
        response = web.json_response({"reason": problem.reason, "message": problem.text or ""}, status=problem.status)
    metrics.PROGRESS_POSTS.labels(code=str(response.status)).inc()
    return response


async def _reload(context: ssl.SSLContext, cert: Path, key: Path) -> None:
    """Take a renewed certificate for new connections: cert-manager and the chart replace the files in place."""
    seen = _changed_at(cert)
    while True:
        await asyncio.sleep(RELOAD_SECONDS)
        try:
            now = _changed_at(cert)
            if now != seen:
                context.load_cert_chain(cert, key)
                seen = now
                logger.info("The progress endpoint's certificate was renewed.")
        except (OSError, ssl.SSLError) as problem:
            logger.warning("The new certificate cannot be used (yet): %s", problem)


def _changed_at(file: Path) -> int:
    return file.stat().st_mtime_ns
