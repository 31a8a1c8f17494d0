"""``spec.trackers``: experiment trackers."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import ConfigDict, Field, StringConstraints, model_validator

from finetune_api.base import ApiModel
from finetune_api.fieldtypes import cel
from finetune_api.spec.references import LocalObjectReference


class TrackerType(StrEnum):
    """Experiment trackers, by their libraries."""

    WEIGHTS_AND_BIASES = "WeightsAndBiases"
    MLFLOW = "MLflow"
    TENSORBOARD = "TensorBoard"
    TRACKIO = "Trackio"


TRACKER_RULES = (
    (
        "self.type != 'TensorBoard' || (!has(self.project) && !has(self.runName) && !has(self.endpointURL) && !has(self.secretRef))",
        "TensorBoard's event files lie beside the other results: leave project, runName, endpointURL and secretRef out",
    ),
    (
        "self.type != 'WeightsAndBiases' || has(self.secretRef)",
        "WeightsAndBiases needs secretRef: a Secret with the key WANDB_API_KEY",
    ),
    (
        "self.type != 'MLflow' || has(self.endpointURL) || has(self.secretRef)",
        "MLflow needs endpointURL, or secretRef: a Secret with the key MLFLOW_TRACKING_URI",
    ),
    (
        "self.type != 'Trackio' || has(self.secretRef)",
        "Trackio needs secretRef: a Secret with the key TRACKIO_WRITE_TOKEN or, for a Space, HF_TOKEN",
    ),
)


class Tracker(ApiModel):
    """An experiment tracker that is told of the run while it trains. It never slows, stops or fails training. The Secret's keys are the
    libraries' own environment names (WANDB_API_KEY, WANDB_ENTITY, WANDB_BASE_URL; MLFLOW_TRACKING_URI, MLFLOW_TRACKING_TOKEN,
    MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD; TRACKIO_SERVER_URL, TRACKIO_SPACE_ID, TRACKIO_WRITE_TOKEN, HF_TOKEN)."""

    type: TrackerType
    project: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$", max_length=128)] | None = Field(
        None, description="Project (MLflow: experiment) that the run belongs to; the default is the namespace."
    )
    run_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_. -]*$", max_length=128)] | None = (
        Field(
            None,
            description="Name of the run; the default is the job's. Every execution of a job goes on in the same run, which its UID tells apart.",
        )
    )
    endpoint_url: Annotated[str, StringConstraints(pattern=r"^https?://[^\s@?#]+$", max_length=2048)] | None = Field(
        None,
        alias="endpointURL",
        description=(
            "Address of the tracking server, or of a Trackio Space (https://huggingface.co/spaces/owner/name), without credentials. Overrides "
            "the Secret's; Weights & Biases has its own as default."
        ),
    )
    secret_ref: LocalObjectReference | None = Field(
        None, description="Secret in the same namespace that holds the credentials, under the libraries' names."
    )

    model_config = ConfigDict(json_schema_extra=cel(*TRACKER_RULES))

    @model_validator(mode="after")
    def _as_its_type_takes_them(self) -> Tracker:
        server = self.endpoint_url or self.secret_ref
        wrong = {
            TrackerType.TENSORBOARD: bool(server or self.project or self.run_name),
            TrackerType.WEIGHTS_AND_BIASES: self.secret_ref is None,
            TrackerType.MLFLOW: not server,
            TrackerType.TRACKIO: self.secret_ref is None,
        }
        if wrong[self.type]:
            raise ValueError(next(words for rule, words in TRACKER_RULES if f"'{self.type.value}'" in rule))
        return self


def _each_once(trackers: list[Tracker]) -> list[Tracker]:
    types = [tracker.type for tracker in trackers]
    twice = next((kind for kind in types if types.count(kind) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice.value} stands twice: at most one tracker of each type")
    return trackers
