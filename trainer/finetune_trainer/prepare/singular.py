"""Spectrum's signal-to-noise ratio of weight matrices, a matrix at a time, without torch."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.weight_files import weight_files

Matrix = npt.NDArray[Any]
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
"""numpy has no bfloat16: its bits are the upper half of a float32's."""
ROWS = 1024
"""Rows of a matrix that are in float64 at one time."""
IQR_OF_NORMAL = 1.349
"""The interquartile range of a normal distribution, in standard deviations."""


class StoredMatrices:
    """Matrices in a model folder's safetensors files, mapped into memory."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, tuple[Path, int, dict[str, Any]]] = {}
        for file in weight_files(folder):
            with (folder / file).open("rb") as opened:
                (length,) = struct.unpack("<Q", opened.read(8))
                header = json.loads(opened.read(length))
            self._where |= {n: (folder / file, 8 + length, e) for n, e in header.items() if n != "__metadata__"}

    def read(self, name: str) -> Matrix:
        """As it is stored; bfloat16 as the bits that it is.

        Raises:
            StageError: UnsupportedModel for anything but floats.
        """
        path, start, entry = self._where[name]
        if entry["dtype"] not in NUMPY:
            raise StageError(
                Reason.UNSUPPORTED_MODEL,
                f"{name} is stored as {entry['dtype']}; Spectrum ranks weights of 16 to 64 bit.",
            )
        offset = start + entry["data_offsets"][0]
        return np.memmap(path, NUMPY[entry["dtype"]], "r", offset, tuple(entry["shape"]))


def numbers(rows: Matrix) -> npt.NDArray[np.float64]:
    """In float64."""
    if rows.dtype == np.uint16:
        rows = (rows.astype(np.uint32) << 16).view(np.float32)
    return rows.astype(np.float64)


def singular_values(matrix: Matrix) -> npt.NDArray[np.float64]:
    """All of them, the largest first: roots of the eigenvalues of the smaller Gram matrix, which are exact to 1e-8 of the largest and take a
    fraction of the time and memory of a decomposition."""
    wide = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    gram = np.zeros((wide.shape[1], wide.shape[1]))
    for start in range(0, len(wide), ROWS):
        part = numbers(np.ascontiguousarray(wide[start : start + ROWS]))
        gram += part.T @ part
    found: npt.NDArray[np.float64] = np.sqrt(np.clip(np.linalg.eigvalsh(gram)[::-1], 0, None))
    return found


def signal_to_noise(matrix: Matrix) -> float:
    """Singular values above the threshold of Marchenko and Pastur over those below, over the largest (Hartford et al., 2024, section 3): a matrix of
    noise has none above σ (1 + √β), where β is the ratio of its sides and σ comes from the interquartile range."""
    values = singular_values(matrix)
    low, high = np.quantile(values, [0.25, 0.75])
    beta = min(matrix.shape) / max(matrix.shape)
    threshold = (high - low) / IQR_OF_NORMAL * (1 + np.sqrt(beta))
    signal, noise = values[values > threshold].sum(), values[values <= threshold].sum()
    if values[0] == 0:
        return 0.0
    return float(signal / (noise if noise > 0 else 1.0) / values[0])


def ratios(folder: Path, names: Iterable[str]) -> dict[str, float]:
    """The ratio of each matrix."""
    stored = StoredMatrices(folder)
    return {name: signal_to_noise(stored.read(name)) for name in names}
