"""Imported before the prepare stage: what its image does not have, and transformers and pyarrow would import where it is there."""

from __future__ import annotations

import sys
from collections.abc import Sequence


class WithoutPandas:
    """Finds no pandas. (pyarrow does not bear with None in its place.)"""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None = None, target: object = None) -> None:
        """Nothing of other modules."""
        del path, target
        if name == "pandas":
            raise ModuleNotFoundError(name)


sys.modules["torch"] = None  # type: ignore[assignment]
sys.meta_path.insert(0, WithoutPandas)
