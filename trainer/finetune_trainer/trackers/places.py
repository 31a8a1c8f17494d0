"""Where a tracker's server is: as the spec says, or else its Secret."""

from __future__ import annotations

import re
from collections.abc import Mapping

from finetune_api.spec import TrackerType

ADDRESS_KEYS = {
    TrackerType.WEIGHTS_AND_BIASES: ("WANDB_BASE_URL",),
    TrackerType.MLFLOW: ("MLFLOW_TRACKING_URI",),
    TrackerType.TRACKIO: ("TRACKIO_SERVER_URL", "TRACKIO_SPACE_ID"),
}
WANDB_CLOUD = "https://api.wandb.ai"
_SPACE = re.compile(r"(?:https://huggingface\.co/spaces/)?([A-Za-z0-9][\w.-]*/[\w.-]+)/?")


def address(kind: TrackerType, endpoint: str | None, secret: Mapping[str, str]) -> str | None:
    """The server's address, or a Trackio Space's; None where nothing says it."""
    keys = ADDRESS_KEYS[kind]
    found = endpoint or next((secret[key] for key in keys if secret.get(key)), None)
    if found is None and kind is TrackerType.WEIGHTS_AND_BIASES:
        return WANDB_CLOUD
    return found.rstrip("/") if found else None


def space_of(place: str) -> str | None:
    """``owner/name``, if a place is a Space on the Hugging Face Hub."""
    found = _SPACE.fullmatch(place)
    return found[1] if found else None
