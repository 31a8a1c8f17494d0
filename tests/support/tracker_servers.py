"""Tracking servers on this machine: MLflow's and W&B's as far as unmodified clients of our pins ask them, and Trackio's own.

Requests and answers are those of mlflow 3.17 (``store/tracking/rest_store.py``) and wandb 0.31 (the queries in wandb-core).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
import uuid
from base64 import b64decode
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import httpx

Json = dict[str, Any]


class FakeServer:
    """An HTTP server whose answers are made by ``answer``."""

    def __init__(self) -> None:
        self.status: int | None = None
        """Every request is answered with this."""
        self.hangs = threading.Event()
        """No request is answered while it is set."""
        self.headers: list[dict[str, str]] = []
        self.requests: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._do()

            def do_POST(self) -> None:
                self._do()

            def do_PUT(self) -> None:
                self._do()

            def _do(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                json_body = body and self.command == "POST"
                given = {**dict(parse_qsl(parts.query)), **(json.loads(body) if json_body else {})}
                owner.headers.append(dict(self.headers))
                owner.requests.append(parts.path)
                while owner.hangs.is_set():
                    time.sleep(0.05)
                status, answer = (
                    (owner.status, {}) if owner.status is not None else owner.answer(parts.path, given, self.headers)
                )
                data = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: object) -> None:
                """Not to the test's output."""

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that was killed."""

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def answer(self, path: str, given: Json, headers: Any) -> tuple[int, Json]:
        """Status and body."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hangs.clear()
        self._server.shutdown()
        self._server.server_close()


class MlflowServer(FakeServer):
    """Experiments and runs; ``token`` must stand in the Authorization header, if set."""

    def __init__(self, token: str | None = None) -> None:
        super().__init__()
        self.token = token
        self.experiments: dict[str, str] = {}
        self.runs: dict[str, Json] = {}

    def points(self, key: str) -> list[tuple[int, float]]:
        """Of the only run: (step, value), in the order in which they came."""
        (run,) = self.runs.values()
        return [(m["step"], m["value"]) for m in run["data"]["metrics"] if m["key"] == key]

    def answer(self, path: str, given: Json, headers: Any) -> tuple[int, Json]:
        if self.token is not None and headers.get("Authorization") != f"Bearer {self.token}":
            return 401, {"error_code": "UNAUTHENTICATED", "message": f"no access with {headers.get('Authorization')}"}
        call = path.partition("/mlflow/")[2]
        if call == "experiments/get-by-name":
            name = given["experiment_name"]
            if name not in self.experiments:
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
            return 200, {
                "experiment": {"experiment_id": self.experiments[name], "name": name, "lifecycle_stage": "active"}
            }
        if call == "experiments/create":
            self.experiments[given["name"]] = str(len(self.experiments) + 1)
            return 200, {"experiment_id": self.experiments[given["name"]]}
        if call == "experiments/search":
            return 200, {"experiments": []}
        if call == "runs/create":
            run_id = uuid.uuid4().hex
            info = {
                "run_id": run_id,
                "run_name": given.get("run_name"),
                "experiment_id": given["experiment_id"],
                "status": "RUNNING",
            }
            self.runs[run_id] = {"info": info, "data": {"metrics": [], "params": [], "tags": given.get("tags", [])}}
            return 200, {"run": self.runs[run_id]}
        if call == "runs/search":
            return 200, {
                "runs": [r for r in self.runs.values() if any(t["value"] in given["filter"] for t in r["data"]["tags"])]
            }
        run = self.runs[given.get("run_id") or given["run_uuid"]]
        if call == "runs/update":
            run["info"] |= {k: given[k] for k in ("status", "end_time") if k in given}
            return 200, {"run_info": run["info"]}
        if call == "runs/log-batch":
            for kind in ("metrics", "params", "tags"):
                run["data"][kind] += given.get(kind, [])
            return 200, {}
        if call == "metrics/get-history":
            return 200, {"metrics": [m for m in run["data"]["metrics"] if m["key"] == given["metric_key"]]}
        if call == "runs/get":
            return 200, {"run": run}
        return 404, {"error_code": "ENDPOINT_NOT_FOUND", "message": path}


class WandbServer(FakeServer):
    """Runs with their history; ``key`` is the API key that may use them."""

    key = "0123456789abcdef" * 2 + "01234567"

    def __init__(self) -> None:
        super().__init__()
        self.history: list[Json] = []
        self.summary: Json = {}
        self.run: Json | None = None
        self.exit_code: int | None = None
        self.inserted = 0

    def points(self, key: str) -> list[tuple[int, float]]:
        """What its chart shows: (step, value)."""
        axis = "eval/step" if key.startswith("eval/") else "train/global_step"
        return [(line[axis], line[key]) for line in self.history if key in line]

    def answer(self, path: str, given: Json, headers: Any) -> tuple[int, Json]:
        if path.startswith("/upload/"):
            return 200, {}
        authorization = headers.get("Authorization", "")
        if not authorization.startswith("Basic ") or b64decode(authorization[6:]).decode() != f"api:{self.key}":
            return 401, {"errors": [{"message": f"permission denied for {authorization}"}]}
        if path.endswith("/file_stream"):
            self._stream(given)
            return 200, {"exitcode": None, "limits": {}}
        return 200, {"data": self._query(given.get("query", ""), given.get("variables", {}))}

    def _query(self, query: str, given: Json) -> Json:
        if "upsertBucket" in query:
            inserted = self.run is None
            self.inserted += inserted
            self.run = {**(self.run or {}), "id": "1", **{k: v for k, v in given.items() if v is not None}}
            project = {"id": "1", "name": given.get("project"), "entity": {"id": "1", "name": "team"}}
            bucket = {
                "id": "1", "name": self.run["name"], "displayName": self.run.get("displayName"), "description": "",
                "config": self.run.get("config"), "sweepName": "", "project": project, "historyLineCount": len(self.history),
            }  # fmt: skip
            return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}
        if "RunResumeStatus" in query:
            if self.run is None:
                return {
                    "model": {
                        "id": "1",
                        "name": given["project"],
                        "entity": {"id": "1", "name": "team"},
                        "bucket": None,
                    }
                }
            bucket = {
                "id": "1", "name": self.run["name"], "summaryMetrics": json.dumps(self.summary), "displayName": "",
                "logLineCount": 0, "historyLineCount": len(self.history), "eventsLineCount": 0,
                "historyTail": json.dumps([json.dumps(line) for line in self.history[-1:]]), "eventsTail": "[]",
                "config": self.run.get("config") or "{}", "tags": [], "notes": "", "wandbConfig": '{"t": 1}',
            }  # fmt: skip
            return {
                "model": {"id": "1", "name": given["project"], "entity": {"id": "1", "name": "team"}, "bucket": bucket}
            }
        if "createRunFiles" in query:
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in given["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if "viewer" in query:
            viewer = {
                "id": "1",
                "entity": "team",
                "username": "team",
                "email": "",
                "flags": "{}",
                "teams": {"edges": []},
            }
            return {"viewer": viewer, "serverInfo": {"features": [], "cliVersionInfo": {}}}
        if "serverInfo" in query:
            return {"serverInfo": {"features": []}}
        return {}

    def _stream(self, given: Json) -> None:
        files = given.get("files") or {}
        if "wandb-history.jsonl" in files:
            part = files["wandb-history.jsonl"]
            self.history[part["offset"] :] = [json.loads(line) for line in part["content"]]
        for line in files.get("wandb-summary.json", {}).get("content", []):
            self.summary |= json.loads(line)
        if given.get("complete"):
            self.exit_code = given["exitcode"]


TRACKIO = """
import sys, uvicorn
from trackio.server import build_starlette_app_only
uvicorn.run(build_starlette_app_only()[0], host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""


class TrackioServer:
    """Trackio's own server, as a process."""

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_urlsafe(32)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        environ = {
            **os.environ,
            "TRACKIO_DIR": str(folder),
            "TRACKIO_WRITE_TOKEN": self.token,
            "HF_HUB_OFFLINE": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
        }
        self._process = subprocess.Popen([sys.executable, "-c", TRACKIO, str(port)], env=environ, cwd=folder)
        deadline = time.monotonic() + 120
        while True:
            try:
                httpx.get(f"{self.url}/version", timeout=5).raise_for_status()
            except httpx.HTTPError:
                assert self._process.poll() is None, "the server ended"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.1)
            else:
                break

    def call(self, name: str, **given: Any) -> Any:
        """One of its API's calls."""
        answer = (
            httpx.post(f"{self.url}/api/{name}", json={"args": [], "kwargs": given}, timeout=30)
            .raise_for_status()
            .json()
        )
        assert answer.get("error") is None, answer
        return answer["data"]

    def __enter__(self) -> TrackioServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)
