"""The held-out split: by prompt, so that no prompt is learned and asked; the same for the same seed and rows."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.near import distinct

NUMBERS = 4096


def fingerprint(of: bytes | memoryview) -> int:
    """64 bits of a text or of token ids. Two of a million collide with a chance of 3e-8."""
    return int.from_bytes(hashlib.blake2b(of, digest_size=8).digest(), "little")


def group_of(prompt: str) -> int:
    """The same for prompts that differ in case, white space or Unicode form only."""
    return fingerprint(" ".join(unicodedata.normalize("NFKC", prompt).split()).casefold().encode())


def copies(weight: float | None, seed: int, row: int) -> int:
    """How often a row of a source stands in the training data: its weight, whose fraction is drawn from seed and row number."""
    if weight is None:
        return 1
    whole = int(weight)
    digest = hashlib.blake2b(f"{seed}:weight:{row}".encode(), digest_size=8).digest()
    return whole + (int.from_bytes(digest, "little") / 2**64 < weight - whole)


def held_out_rows(groups: npt.NDArray[np.uint64], fraction: float, seed: int) -> npt.NDArray[np.bool_]:
    """Per row, whether it is held out: whole groups, about ``fraction`` of the rows, at least one row on each side.

    Groups are taken in an order drawn from the seed as long as they fit. Where none fits, the smallest is taken.

    Raises:
        StageError: TooFewRows, if there are not two groups.
    """
    rows = len(groups)
    first, index = distinct(groups)
    if len(first) < 2:
        found = f"{rows:,} usable row{'' if rows == 1 else 's'}" + (" with one and the same prompt" if rows > 1 else "")
        raise StageError(
            Reason.TOO_FEW_ROWS,
            f"{found}: expected at least 2 with different prompts, to train on one and hold out the other",
        )
    target = max(1, round(fraction * rows))
    counts = np.bincount(index)
    keys = (hashlib.blake2b(b"%d:%d" % (seed, name), digest_size=8).digest() for name in _numbers(groups, first))
    order = np.argsort(np.fromiter((int.from_bytes(key, "big") for key in keys), np.uint64, len(first)), kind="stable")
    chosen: list[int] = []
    held = 0
    for group in map(int, order):
        if held + counts[group] <= target:
            chosen.append(group)
            held += int(counts[group])
            if held == target:
                break
    if not chosen:
        chosen = [int(order[np.argmin(counts[order])])]
    mask = np.zeros(len(first), bool)
    mask[chosen] = True
    return np.asarray(mask[index], bool)


def _numbers(groups: npt.NDArray[np.uint64], places: npt.NDArray[np.int32]) -> Iterator[int]:
    """The groups at some places, as Python's numbers, which take five times the memory: some at a time."""
    for start in range(0, len(places), NUMBERS):
        yield from groups[places[start : start + NUMBERS]].tolist()
