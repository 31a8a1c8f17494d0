"""Is what training will change what the prepare stage counted?"""

from __future__ import annotations

import json
import logging
from pathlib import Path

from finetune_api.failures import Reason
from finetune_api.planner import UnknownArchitecture, describe, parse_config
from finetune_api.planner.tensors import parameter_shapes, parameters
from finetune_trainer.errors import StageError
from finetune_trainer.publish.safetensors_stream import Checkpoint

log = logging.getLogger(__name__)


def must_be_as_counted(found: int, counted: int, folder: Path, *, own_code: bool) -> None:
    """Compare the trainable weights with those that prepare counted from the shapes in the files. peft takes a name that fits nothing, or too
    much, without a word.

    Args:
        folder: the base model's files.
        own_code: the model brings its code.

    Raises:
        StageError: VerificationFailed, if they differ where the count is exact.
    """
    if found == counted:
        return
    if not own_code and is_exact(folder):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{found:,} weights would be trained, and the prepare stage counted {counted:,}: they would not be those that were asked for. "
            "Please report this with the job's method.",
        )
    log.warning(
        "%s weights are trained; by the shapes in the model's files it would be %s", f"{found:,}", f"{counted:,}"
    )


def is_exact(folder: Path) -> bool:
    """Whether the files have just the tensors that the model is made of: so it is in dense families that are known, where nothing else, such as
    the head of a reward model, is stored beside them. Experts are counted by what their files call them, and transformers puts them together.
    """
    try:
        arch = parse_config(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except UnknownArchitecture:
        return False
    if not arch.known or arch.experts:
        return False
    stored = {name: info.shape for name, info in Checkpoint(folder).tensors.items()}
    return parameters(parameter_shapes(stored, arch)) == parameters(describe(arch))
