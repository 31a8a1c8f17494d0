"""Experiment trackers, before a GPU is asked for: their Secrets are there, and their servers do not refuse them.

The libraries are not in this image: one plain request tells as much. A server that is away is no reason to wait, since it is none to
stop a training either.
"""

from __future__ import annotations

import httpx

from finetune_api.failures import Reason
from finetune_api.names import tracker_slot
from finetune_api.spec import Tracker, TrackerType
from finetune_trainer.context import StageContext
from finetune_trainer.credentials import Credentials
from finetune_trainer.errors import StageError
from finetune_trainer.private import without_credentials
from finetune_trainer.trackers.places import ADDRESS_KEYS, address, space_of

TIMEOUT = httpx.Timeout(10.0, connect=5.0)
HUB = "https://huggingface.co"
REFUSED = (401, 403)


def check_trackers(ctx: StageContext) -> list[str]:
    """What there is to warn of.

    Raises:
        StageError: SecretMissing; AccessDenied, if a server refuses the credentials; InvalidConfig.
    """
    found = [
        check_tracker(ctx, tracker)
        for tracker in ctx.snapshot.spec.trackers or []
        if tracker.type is not TrackerType.TENSORBOARD
    ]
    return [warning for warning in found if warning is not None]


def check_tracker(ctx: StageContext, tracker: Tracker) -> str | None:
    """One of them."""
    kind, slot = tracker.type, tracker_slot(tracker.type)
    name = tracker.secret_ref.name if tracker.secret_ref is not None else None
    credentials = Credentials(slot, name, ctx.secrets_dir / slot if name is not None else None)
    secret = credentials.values()
    place = address(kind, tracker.endpoint_url, secret)
    if place is None:
        credentials.require(ADDRESS_KEYS[kind][0])
        raise AssertionError("the spec's rules ask for an address or a Secret")
    if not place.startswith(("http://", "https://")) and (kind is not TrackerType.TRACKIO or space_of(place) is None):
        raise StageError(
            Reason.INVALID_CONFIG,
            # No more of it: a database's address holds its password, and what has no scheme may be anything.
            f"trackers, {kind.value}: {ADDRESS_KEYS[kind][0]} {beginning(place)}; expected the http:// or https:// address of a server",
        )
    credentials.require(*needed(kind, place, secret))
    return ask(kind, place, secret)


def beginning(place: str) -> str:
    """What may be told of an address that is none of a web server."""
    scheme, found, _ = place.partition("://")
    return f"begins with {scheme + '://'!r}" if found else "is no address"


def needed(kind: TrackerType, place: str, secret: dict[str, str]) -> list[str]:
    """The keys without which a Secret is of no use there."""
    if kind is TrackerType.WEIGHTS_AND_BIASES:
        return ["WANDB_API_KEY"]
    if kind is TrackerType.TRACKIO:
        return ["HF_TOKEN" if space_of(place) else "TRACKIO_WRITE_TOKEN"]
    if "MLFLOW_TRACKING_USERNAME" in secret:
        return ["MLFLOW_TRACKING_PASSWORD"]
    return [] if secret else ["MLFLOW_TRACKING_TOKEN"]


def ask(kind: TrackerType, place: str, secret: dict[str, str]) -> str | None:
    """One request.

    Raises:
        StageError: AccessDenied.
    """
    shown = without_credentials(place)
    try:
        with httpx.Client(timeout=TIMEOUT) as client:
            response = client.send(request(client, kind, place, secret))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return f"{kind.value}: {shown} cannot be reached ({type(error).__name__}); training will try again, and does not wait for it"
    # W&B's GraphQL may answer 200 to a key that nobody has.
    nobody = kind is TrackerType.WEIGHTS_AND_BIASES and response.is_success and nobody_there(response)
    if response.status_code in REFUSED or nobody:
        raise StageError(
            Reason.ACCESS_DENIED,
            f"trackers, {kind.value}: {shown} refused the credentials (status {response.status_code})",
        )
    if not response.is_success:
        return (
            f"{kind.value}: {shown} answered {response.status_code}; training will try again, and does not wait for it"
        )
    return None


def request(client: httpx.Client, kind: TrackerType, place: str, secret: dict[str, str]) -> httpx.Request:
    """The smallest one that asks for credentials, where there is one. (A Trackio server has none: it tells its version to everyone.)"""
    if kind is TrackerType.WEIGHTS_AND_BIASES:
        basic = httpx.BasicAuth("api", secret["WANDB_API_KEY"])
        asked = client.build_request("POST", f"{place}/graphql", json={"query": "query Viewer { viewer { id } }"})
        return next(basic.auth_flow(asked))
    if kind is TrackerType.TRACKIO:
        if space_of(place) is None:
            return client.build_request("GET", f"{place}/version")
        headers = {"Authorization": f"Bearer {secret['HF_TOKEN']}"}
        return client.build_request("GET", f"{HUB}/api/whoami-v2", headers=headers)
    asked = client.build_request("GET", f"{place}/api/2.0/mlflow/experiments/search", params={"max_results": 1})
    if "MLFLOW_TRACKING_USERNAME" in secret:
        basic = httpx.BasicAuth(secret["MLFLOW_TRACKING_USERNAME"], secret["MLFLOW_TRACKING_PASSWORD"])
        return next(basic.auth_flow(asked))
    if "MLFLOW_TRACKING_TOKEN" in secret:
        asked.headers["Authorization"] = f"Bearer {secret['MLFLOW_TRACKING_TOKEN']}"
    return asked


def nobody_there(response: httpx.Response) -> bool:
    """Whether GraphQL knows no one by the key."""
    try:
        return response.json()["data"]["viewer"] is None
    except (ValueError, KeyError, TypeError):
        return False
