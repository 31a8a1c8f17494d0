"""Paths inside mounted claims."""

from __future__ import annotations

from pathlib import Path

from finetune_api.failures import Reason
from finetune_api.uris import PvcLocation
from finetune_trainer.errors import StageError


def pvc_path(pvc_dir: Path, location: PvcLocation, missing: Reason) -> Path:
    """Where a claim's path is mounted. Neither ``..`` nor a link may lead out of the claim.

    Raises:
        StageError: ``missing``, if nothing is there.
    """
    root = (pvc_dir / location.claim).resolve()
    path = (root / location.path).resolve()
    if not path.is_relative_to(root):
        raise StageError(Reason.INVALID_CONFIG, f"pvc://{location.claim}/{location.path} leads out of the volume")
    if not path.exists():
        raise StageError(missing, f"pvc://{location.claim}/{location.path} does not exist in the volume")
    return path
