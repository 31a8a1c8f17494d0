"""A run on a Trackio server or in a Trackio Space, told of over its HTTP API.

Not through ``trackio.init``: that puts a run's lines into the pod's own database when the server is away, where nobody finds them, tells
a run by its name only, and creates a public Space where none is.
"""

from __future__ import annotations

from typing import Any

from trackio.remote_client import RemoteClient

from finetune_trainer.trackers.lines import STEP_METRIC, Known, Line, is_evaluation, metrics
from finetune_trainer.trackers.places import address, space_of
from finetune_trainer.trackers.protocol import Opening, TrackerError

REQUEST_SECONDS = 20


class TrackioRun:
    """The run whose id is the FineTuneJob's UID."""

    def __init__(self, opening: Opening, secret: dict[str, str]) -> None:
        place = address(opening.type, opening.endpoint, secret)
        if place is None:
            raise TrackerError(f"Secret {opening.secret_name} lacks TRACKIO_SERVER_URL and TRACKIO_SPACE_ID")
        space = space_of(place)
        self._token = secret.get("HF_TOKEN")
        self._client = RemoteClient(
            space or place,
            hf_token=self._token,
            write_token=secret.get("TRACKIO_WRITE_TOKEN"),
            httpx_kwargs={"timeout": REQUEST_SECONDS},
        )
        self._opening = opening
        told = self._client.predict(
            api_name="/get_run_summary", project=opening.project, run=opening.run_name, run_id=opening.run_id
        )
        last = told["last_step"] if told["num_logs"] else None
        # What is told twice counts once, by its log_id: it may be more than is new.
        self.known = Known() if last is None else Known(step=last - 1)
        self.url = f"https://huggingface.co/spaces/{space}" if space else place
        self._config: dict[str, Any] | None = opening.config

    def log(self, lines: list[Line]) -> None:
        """In one request."""
        self._send(
            [
                {
                    "metrics": {**metrics(line), STEP_METRIC: int(line["step"])},
                    "step": int(line["step"]),
                    "log_id": f"{'eval' if is_evaluation(line) else 'train'}-{line['step']}",
                }
                for line in lines
            ]
        )

    def finish(self, summary: dict[str, Any], failed: bool) -> None:
        """Trackio knows no end of a run: a last line holds the final numbers."""
        step = int(summary.get("final/steps", self.known.step))
        self._send([{"metrics": {**summary, "final/failed": failed}, "step": step, "log_id": "final"}])

    def _send(self, entries: list[dict[str, Any]]) -> None:
        opening = self._opening
        common = {"project": opening.project, "run": opening.run_name, "run_id": opening.run_id}
        logs = [{**common, **e, "config": None, "log_id": f"{opening.run_id}-{e['log_id']}"} for e in entries]
        logs[0]["config"] = self._config
        self._client.predict(api_name="/bulk_log", logs=logs, hf_token=self._token)
        self._config = None
