"""Which files of a model's folder its weights are read from: the same for whoever reads them, with torch or without."""

from __future__ import annotations

import json
from pathlib import Path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


def weight_files(folder: Path) -> list[str]:
    """Chosen as transformers chooses them: the one file, else those that the index names."""
    index = folder / INDEX
    if (folder / SINGLE).exists() or not index.exists():
        return [SINGLE]
    return sorted(set(json.loads(index.read_text())["weight_map"].values()))
