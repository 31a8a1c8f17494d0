"""A model's architecture and shapes from files on disk: config.json, and the headers of safetensors files."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_api.planner import Architecture, Shapes, UnknownArchitecture, describe, parameter_shapes, parse_config
from finetune_cli.job_file import BadInput

MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class ModelFiles:
    """What a model's files tell of it."""

    config: dict[str, Any]
    """config.json."""
    architecture: Architecture
    shapes: Shapes
    """Of every parameter."""
    stored: Collection[str]
    """Names of the tensors in the files; by config.json alone those that transformers has."""


def from_config(path: Path) -> ModelFiles:
    """By config.json alone, for families whose tensors are known.

    Raises:
        BadInput: no decoder's configuration, or an unknown family.
    """
    config, arch = read_architecture(path)
    if not arch.known:
        raise BadInput(
            f"{path}: the tensors of this model_type are not known by heart. Give --model-folder with its safetensors files."
        )
    shapes = describe(arch)
    return ModelFiles(config, arch, shapes, shapes)


def from_folder(folder: Path) -> ModelFiles:
    """By config.json and the safetensors headers; without safetensors files as :func:`from_config`.

    Raises:
        BadInput: as there, or a file that is not safetensors.
    """
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return from_config(folder / "config.json")
    config, arch = read_architecture(folder / "config.json")
    headers: dict[str, tuple[int, ...]] = {}
    for file in files:
        headers |= read_header(file)
    return ModelFiles(config, arch, parameter_shapes(headers, arch), headers)


def read_architecture(path: Path) -> tuple[dict[str, Any], Architecture]:
    """Read and parse a config.json.

    Raises:
        BadInput: not there, not JSON, or no decoder's.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        return dict(config), parse_config(config)
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error}") from error
    except UnknownArchitecture as error:
        raise BadInput(f"{path}: {error}") from error
    except (ValueError, AttributeError, TypeError) as error:
        raise BadInput(f"{path} is not a model's config.json: {error}") from error


def read_header(path: Path) -> dict[str, tuple[int, ...]]:
    """Name → shape of every tensor (safetensors format: 8 bytes of length, then JSON).

    Raises:
        BadInput: not a safetensors file.
    """
    with path.open("rb") as file:
        start = file.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else math.inf
        if size > MAX_HEADER_BYTES:
            raise BadInput(f"{path} is not a safetensors file: its header would have {size} bytes")
        text = file.read(int(size))
    try:
        entries = json.loads(text)
        return {name: tuple(entry["shape"]) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(f"{path} is not a safetensors file: {error!r}") from error
