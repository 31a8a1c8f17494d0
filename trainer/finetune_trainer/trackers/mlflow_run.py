"""A run on an MLflow tracking server."""

from __future__ import annotations

import json
import time
from typing import Any

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from finetune_trainer.trackers.lines import Known, Line, flat, metrics
from finetune_trainer.trackers.places import address
from finetune_trainer.trackers.protocol import Opening, TrackerError

TAG_UID, TAG_JOB = "finetune.dev/job-uid", "finetune.dev/job"
MOST_PARAMS = 100
"""Of one request."""
MOST_CHARACTERS = 500
"""Of a parameter, in servers of any age."""


class MlflowRun:
    """The run that is tagged with the FineTuneJob's UID."""

    def __init__(self, opening: Opening, secret: dict[str, str]) -> None:
        uri = address(opening.type, opening.endpoint, secret)
        if uri is None:
            raise TrackerError(f"Secret {opening.secret_name} lacks MLFLOW_TRACKING_URI")
        self._client = client = MlflowClient(tracking_uri=uri)
        experiment = self._experiment(opening.project)
        found = client.search_runs([experiment], f"tags.`{TAG_UID}` = '{opening.run_id}'", max_results=1)
        if found:
            self._id = found[0].info.run_id
            client.update_run(self._id, status="RUNNING")
            self.known = Known(self._last("train/loss"), self._last("eval/loss"))
        else:
            tags = {TAG_UID: opening.run_id, TAG_JOB: opening.job}
            self._id = client.create_run(experiment, run_name=opening.run_name, tags=tags).info.run_id
            self.known = Known()
        if self.known == Known():
            values = [Param(k, as_text(v)) for k, v in flat(opening.config).items()]
            for start in range(0, len(values), MOST_PARAMS):
                client.log_batch(self._id, params=values[start : start + MOST_PARAMS])
        self.url = f"{uri}/#/experiments/{experiment}/runs/{self._id}"

    def _experiment(self, name: str) -> str:
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name))
            except MlflowException as error:
                # Another job of the project has created it meanwhile.
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self._client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def _last(self, key: str) -> int:
        return max((m.step for m in self._client.get_metric_history(self._id, key)), default=-1)

    def log(self, lines: list[Line]) -> None:
        """One request: lines come some at a time."""
        now = int(1000 * time.time())
        values = [Metric(k, v, now, int(line["step"])) for line in lines for k, v in metrics(line).items()]
        self._client.log_batch(self._id, metrics=values)

    def finish(self, summary: dict[str, Any], failed: bool) -> None:
        """Final numbers as metrics, texts as tags."""
        now = int(1000 * time.time())
        numbers = {k: v for k, v in summary.items() if isinstance(v, int | float)}
        texts = {k: v for k, v in summary.items() if k not in numbers}
        self._client.log_batch(
            self._id,
            metrics=[Metric(k, float(v), now, 0) for k, v in numbers.items()],
            tags=[RunTag(f"finetune.dev/{k.rpartition('/')[2]}", as_text(v)) for k, v in texts.items()],
        )
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


def as_text(value: Any) -> str:
    """A parameter's value."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text[:MOST_CHARACTERS]
