"""How much of a model QLoRA holds in 4 bit, by the planner's rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetune_api import planner
from finetune_api.failures import Reason
from finetune_api.planner import Shapes, UnknownArchitecture, Unsuitable, parameter_shapes, parse_config
from finetune_api.spec import MethodType
from finetune_trainer.errors import StageError


def left_in_16_bit(method: MethodType, config: Mapping[str, Any], stored: Shapes, uri: str) -> str | None:
    """A warning, where that is much; none for a model of which nothing is known.

    Args:
        config: config.json.
        stored: shapes of the tensors in the files.

    Raises:
        StageError: InvalidConfig, for QLoRA where it is all.
    """
    try:
        arch = parse_config(config)
        return planner.left_in_16_bit(method, arch, parameter_shapes(stored, arch), uri)
    except UnknownArchitecture:
        return None
    except Unsuitable as error:
        raise StageError(Reason.INVALID_CONFIG, str(error)) from error
