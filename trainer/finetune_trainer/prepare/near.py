"""Rows that are nearly the same, by MinHash (Broder, 1997): what they share of runs of characters, estimated from a small sketch.

A row's sketch is 64 bytes: the lowest 8 bits of each of 64 MinHash slots (b-bit minwise hashing, Li and König, 2010). Memory holds the
sketches and, while they are compared, about 90 bytes a row more. Rows are compared where a band of their sketches is the same, and
only with the first and the next row of such a bucket, so a bucket of a million rows costs two million comparisons.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import rensa

SLOTS = 64
SEED = 42
WIDTH = 16
"""Bytes of a shingle: about three words of English, or five characters of Chinese."""
TOKENS = 5
"""Tokens of a shingle, of rows that come as token ids."""
MOST = 1 << 20
"""Characters of a row that are looked at, or tokens: memory is forty times a row's size."""
CHUNK = 1 << 16
PART_ROWS = 1 << 18
"""Rows whose bands are compared at a time, or twice as many: what bounds the memory of that."""
STEEP = 0.75
"""From this similarity on, bands of 8 slots find nearly all pairs; below it, bands of 4 do, with more comparisons."""

Hashes = npt.NDArray[np.uint64]
Sketches = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.int32]
Labels = npt.NDArray[np.int32]
"""Rows of a job: fewer than 2³¹."""

_PRIME = np.uint64(0x9E3779B97F4A7C15)
_SPACE = np.uint8(ord(" "))


def _plain_bytes() -> npt.NDArray[np.uint8]:
    """What stands for each byte: ASCII letters in lower case, white space and punctuation as a blank."""
    table = np.arange(256, dtype=np.uint8)
    for code in range(128):
        character = chr(code)
        table[code] = ord(character.lower()) if character.isalnum() else _SPACE
    return table


_PLAIN = _plain_bytes()


def shingles(rows: Sequence[str | Tokens]) -> list[Hashes]:
    """Hashes of all runs of 16 bytes of each text, whose case, white space and punctuation do not count; of 5 tokens where a row comes as
    tokens."""
    rows = [row[:MOST] for row in rows]
    texts = [row.encode() for row in rows if isinstance(row, str)]
    of_texts = iter(_shingles(_plain(texts), WIDTH))
    of_tokens = iter(_shingles([row.astype(np.uint64) for row in rows if not isinstance(row, str)], TOKENS))
    return [next(of_texts) if isinstance(row, str) else next(of_tokens) for row in rows]


def _plain(texts: list[bytes]) -> list[Hashes]:
    """Each text's bytes, with one blank for white space and punctuation between words and none at its ends."""
    if not texts:
        return []
    plain = _PLAIN[np.frombuffer(b" " + b" ".join(texts) + b" ", np.uint8)]
    blank = plain == _SPACE
    # The blank before a word stays; a text begins with the blank that joins it to the one before, and ends before the next.
    kept = ~blank | np.append(~blank[1:], False)
    before = np.cumsum(kept)
    units = plain[kept].astype(np.uint64)
    ends = np.cumsum([len(text) + 1 for text in texts])
    bounds = [0, *before[ends - 1].tolist()]
    parts = [units[start:end] for start, end in pairwise(bounds)]
    return [part[1:] if len(part) and part[0] == _SPACE else part for part in parts]


def _shingles(rows: list[Hashes], width: int) -> list[Hashes]:
    """A hash for each run of ``width`` units; one for a row that is shorter."""
    if not rows:
        return []
    rows = [row if len(row) >= width else np.append(row, np.zeros(width - len(row), np.uint64)) for row in rows]
    units = np.concatenate(rows) + np.uint64(1)
    # A polynomial in _PRIME, its powers of two first: of 16 units in 4 steps. Runs across two rows are made with the others and left.
    hashes, done, power = np.zeros(len(units) - width + 1, np.uint64), 0, _PRIME
    part, size = units, 1
    with np.errstate(over="ignore"):
        while size <= width:
            if width & size:
                hashes = hashes * power + part[done : done + len(hashes)]
                done += size
            part = part[:-size] * power + part[size:] if len(part) > size else part
            power = power * power
            size *= 2
        hashes = (hashes ^ (hashes >> np.uint64(29))) * _PRIME
    starts = np.cumsum([0, *map(len, rows)]).tolist()
    return [hashes[start : start + len(row) - width + 1] for start, row in zip(starts, rows, strict=False)]


def sketch(rows: Sequence[Hashes]) -> Sketches:
    """(rows, 64) bytes."""
    if not rows:
        return np.zeros((0, SLOTS), np.uint8)
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(rows), offsets, SLOTS, SEED)
    return (np.array(matrix.to_rows(), np.uint32) & np.uint32(0xFF)).astype(np.uint8)


def clusters(sketches: Sketches, contents: Hashes, threshold: float) -> Labels:
    """A label per row, the same for rows that are nearly the same, also by way of others.

    Args:
        sketches: (rows, 64).
        contents: a hash of each row; rows with the same one are the same.
        threshold: Jaccard similarity of their shingles from which on two rows are nearly the same.
    """
    first, same = distinct(contents)
    if len(first) == len(contents):
        first = same = np.arange(len(contents), dtype=np.int32)
    parents = array("i", range(len(first)))
    labels = np.frombuffer(parents, np.int32)
    for slots in _bands(8 if threshold >= STEEP else 4):
        for part in _parts(sketches[:, slots[0]], first):
            _join_band(sketches, first, part, slots, threshold, parents)
        while not np.array_equal(labels[labels], labels):
            labels[:] = labels[labels]
    return np.asarray(labels[same])


def distinct(values: Hashes) -> tuple[Labels, Labels]:
    """Where each value stands first, by value; and for each row the place of its value among those. As np.unique, in half the memory."""
    order = np.argsort(values, kind="stable").astype(np.int32)
    ordered = values[order]
    begins = np.ones(len(values), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    del ordered
    same = np.empty(len(values), np.int32)
    same[order] = np.cumsum(begins, dtype=np.int32) - np.int32(1)
    return order[begins], same


def _bands(width: int) -> list[npt.NDArray[np.int64]]:
    """The slots of each band, every slot in two bands: neighbours, and such as lie apart."""
    slots = np.arange(SLOTS)
    return [*slots.reshape(-1, width), *slots.reshape(width, -1).T]


def _parts(slot: npt.NDArray[np.uint8], first: Labels) -> Iterator[Labels]:
    """The rows in parts that are compared one after the other: those that differ in a band's first slot have no bucket in common."""
    bits = min(8, (len(first) // PART_ROWS).bit_length())
    values = slot[first] >> np.uint8(8 - bits) if bits else np.zeros(len(first), np.uint8)
    for value in range(1 << bits):
        yield np.flatnonzero(values == value).astype(np.int32)


def _join_band(
    sketches: Sketches,
    first: Labels,
    part: Labels,
    slots: npt.NDArray[np.int64],
    threshold: float,
    parents: array[int],
) -> None:
    band = sketches[first[part][:, None], slots].view(f"<u{len(slots)}")[:, 0]
    order = np.argsort(band, kind="stable")
    band, part = band[order], part[order]
    begins = np.concatenate([[True], band[1:] != band[:-1]])
    firsts = np.maximum.accumulate(np.where(begins, np.arange(len(band)), 0))
    later = np.flatnonzero(~begins)
    for start in range(0, len(later), CHUNK):
        rows = later[start : start + CHUNK]
        for other in (firsts[rows], rows - 1):
            _join(sketches, first, part[rows], part[other], threshold, parents)


def _join(
    sketches: Sketches, first: Labels, rows: Labels, others: Labels, threshold: float, parents: array[int]
) -> None:
    labels = np.frombuffer(parents, np.int32)
    apart = labels[rows] != labels[others]
    rows, others = rows[apart], others[apart]
    equal = (sketches[first[rows]] == sketches[first[others]]).mean(axis=1)
    # Of slots that differ one in 256 has the same lowest 8 bits.
    near = (equal - 1 / 256) / (1 - 1 / 256) >= threshold
    for row, other in zip(rows[near].tolist(), others[near].tolist(), strict=True):
        low, high = sorted((_root(parents, row), _root(parents, other)))
        parents[high] = low


def _root(parents: array[int], row: int) -> int:
    while parents[row] != row:
        parents[row] = parents[parents[row]]
        row = parents[row]
    return row


def joined(groups: Hashes, labels: Labels) -> Hashes:
    """Groups whose rows are nearly the same as one: each row has the smallest name of all groups that hang together."""
    first, group = distinct(groups)
    found = group
    while True:
        by_label = _smallest(found, labels, len(labels))
        by_group = _smallest(by_label, group, len(first))
        if np.array_equal(by_group, found):
            return np.asarray(groups[first[found]])
        found = by_group


def _smallest(values: Labels, of: Labels, count: int) -> Labels:
    """For each row the smallest value among the rows that share its ``of``."""
    smallest = np.full(count, np.iinfo(np.int32).max, np.int32)
    np.minimum.at(smallest, of, values)
    return np.asarray(smallest[of])
