"""A chat completions server on 127.0.0.1 whose replies a test decides."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

Reply = Callable[[str, str], str]
"""The judge's words, from answer A and answer B."""


@dataclass
class Fault:
    """What is answered instead of a reply, once."""

    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0
    """Before anything is sent."""
    byte_seconds: float = 0
    """Between two bytes."""


class JudgeServer:
    """Use as a context manager; ``faults`` are answered first, in order."""

    def __init__(self, reply: Reply) -> None:
        self.reply = reply
        self.faults: list[Fault] = []
        self.requests: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.paths: list[str] = []
        judge = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                judge.requests.append(body)
                judge.keys.append(self.headers.get("Authorization"))
                judge.paths.append(self.path)
                fault = judge.faults.pop(0) if judge.faults else Fault()
                time.sleep(fault.seconds)
                data = fault.body if fault.body is not None else judge.completion(body)
                self.send_response(fault.status)
                for name, value in fault.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                for part in [data[i : i + 1] for i in range(len(data))] if fault.byte_seconds else [data]:
                    self.wfile.write(part)
                    time.sleep(fault.byte_seconds)

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def completion(self, body: dict[str, Any]) -> bytes:
        """A chat completion as OpenAI's."""
        text: str = body["messages"][-1]["content"]
        a = text.partition("[Answer of assistant A]\n")[2].partition("\n\n[Answer of assistant B]\n")[0]
        b = text.partition("[Answer of assistant B]\n")[2].partition("\n\n[End of the answers]")[0]
        choice = {"index": 0, "message": {"role": "assistant", "content": self.reply(a, b)}, "finish_reason": "stop"}
        return json.dumps({"object": "chat.completion", "model": body["model"], "choices": [choice]}).encode()

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
