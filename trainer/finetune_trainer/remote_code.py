"""Code that a model repository ships (model.trustRemoteCode), told apart from the libraries' own when it fails."""

from __future__ import annotations

import traceback
from pathlib import Path

PACKAGE = "transformers_modules"
"""The package below which transformers imports such code."""


def remote_code(error: BaseException) -> str:
    """Where in the model repository's code an error arose; empty if it was not there."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if PACKAGE in Path(frame.filename).parts:
            return f"{Path(frame.filename).name}:{frame.lineno} ({frame.name})"
    return ""
