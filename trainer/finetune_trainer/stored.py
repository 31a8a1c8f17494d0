"""Results of other stages and executions, as they lie in the bucket."""

from __future__ import annotations

import json
from typing import TypeVar

from finetune_api.combination import COMBINATION_VERSION, CombinationManifest
from finetune_api.failures import Reason
from finetune_api.results import MANIFEST_VERSION, RESULT_VERSION, Manifest, PrepareResult, TrainResult
from finetune_trainer.errors import StageError
from finetune_trainer.s3 import S3Store

R = TypeVar("R", PrepareResult, TrainResult, Manifest, CombinationManifest)
NEWEST = {
    PrepareResult: RESULT_VERSION,
    TrainResult: RESULT_VERSION,
    Manifest: MANIFEST_VERSION,
    CombinationManifest: COMBINATION_VERSION,
}


def read_stored(store: S3Store, key: str, model: type[R]) -> R:
    """A result. One that is not readable is pydantic's ValidationError, for callers to whom it counts as missing.

    Raises:
        StageError: InvalidConfig for a newer version: to do its work anew would throw away what a newer image did.
        NotFound: there is none.
    """
    data = store.get_bytes(key)
    refuse_newer(store.uri(key), version_of(data), NEWEST[model])
    return model.model_validate_json(data)


def refuse_newer(what: str, found: int, newest: int) -> None:
    """Raises InvalidConfig for a version that this image does not know."""
    if found > newest:
        raise StageError(
            Reason.INVALID_CONFIG,
            f"{what} has version {found}; this image reads versions up to {newest}. It was written by a newer image: let "
            "runtime.image be the same version for all stages of a job.",
        )


def version_of(data: bytes) -> int:
    """The version that a JSON object names; 0 for none, and for anything else."""
    try:
        version = json.loads(data)["version"]
    except (ValueError, KeyError, TypeError):
        return 0
    return version if isinstance(version, int) else 0
