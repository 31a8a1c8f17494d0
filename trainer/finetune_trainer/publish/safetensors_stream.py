"""Safetensors files, read and written a few rows of a tensor at a time.

The library's own writer wants all tensors of a file in memory at once. The format is simple (8 bytes of header length, JSON
header, bytes): https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import safe_open

from finetune_api.planner.tensors import BUFFER
from finetune_api.results import FileRecord
from finetune_trainer.weight_files import weight_files

CHUNK_BYTES = 16 << 20
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CODES = {dtype: code for code, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies."""

    name: str
    file: str
    code: str
    """The format's own name of the element type."""
    shape: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype | None:
        """None for what is copied as it is: anything that is not a plain float, and buffers that old files hold (GPT-NeoX's ``masked_bias`` may be
        -inf)."""
        return None if BUFFER.search(self.name) else DTYPES.get(self.code)

    @property
    def elements(self) -> int:
        """How many."""
        return math.prod(self.shape)


class Checkpoint:
    """A model folder's weights: names, types and shapes at once, values on demand, through the page cache (never a heap copy)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self.tensors: dict[str, TensorInfo] = {}
        for file in self.files:
            header = read_header(folder / file)
            # In the order of their bytes, so that a copy reads forward.
            entries = sorted(header.items(), key=lambda e: e[1]["data_offsets"])
            self.tensors |= {n: TensorInfo(n, file, e["dtype"], tuple(e["shape"])) for n, e in entries}

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, as stored."""
        with safe_open(self.folder / self.tensors[name].file, "pt") as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def read_range(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Some rows of a tensor."""
        with safe_open(self.folder / self.tensors[name].file, "pt") as file:
            return file.get_slice(name)[start:stop]  # type: ignore[no-any-return]

    def read_rows(self, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, torch.Tensor]]:
        """A tensor in parts along its first dimension: (first row, rows)."""
        info = self.tensors[name]
        with safe_open(self.folder / info.file, "pt") as file:
            if len(info.shape) < 2:
                yield 0, file.get_tensor(name)
                return
            part = file.get_slice(name)
            step = rows_per_chunk(info.shape, chunk_bytes)
            for start in range(0, info.shape[0], step):
                yield start, part[start : start + step]


def module_of(tensor: str) -> str:
    """``model.layers.0.mlp.up_proj.weight`` → ``model.layers.0.mlp.up_proj``."""
    return tensor.rpartition(".")[0]


def rows_per_chunk(shape: tuple[int, ...], chunk_bytes: int = CHUNK_BYTES) -> int:
    """Rows of a matrix that fit a chunk in float32; at least one."""
    return max(1, chunk_bytes // (4 * max(1, math.prod(shape[1:]))))


def read_header(path: Path) -> dict[str, Any]:
    """The JSON header, without its metadata."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header


class StreamWriter:
    """Writes a safetensors file tensor by tensor, in the order announced, and hashes it on the way."""

    def __init__(self, path: Path, tensors: list[TensorInfo]) -> None:
        self._path = path
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._size = 0
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        offset = 0
        for info in tensors:
            end = offset + info.elements * element_size(info)
            header[info.name] = {"dtype": info.code, "shape": list(info.shape), "data_offsets": [offset, end]}
            offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the first tensor is aligned
        self._expected = 8 + len(text) + offset
        self._write(struct.pack("<Q", len(text)) + text)

    def write(self, values: torch.Tensor) -> int:
        """The next values of the current tensor; returns how many bytes."""
        data = values.contiguous().reshape(-1).view(torch.uint8).numpy().data
        self._write(data)
        return len(data)

    def record(self, name: str) -> FileRecord:
        """What was written, once it is whole."""
        assert self._size == self._expected, f"{self._path}: {self._size} bytes written, {self._expected} announced"
        return FileRecord(path=name, size=self._size, sha256=self._digest.hexdigest())

    def _write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._size += len(data)

    def __enter__(self) -> StreamWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def element_size(info: TensorInfo) -> int:
    """Bytes of an element."""
    sizes = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
    return sizes.get(info.code, 1)
