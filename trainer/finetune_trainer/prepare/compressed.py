"""Compressed files, told by their first bytes, as streams of what they hold."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import pyarrow as pa

from finetune_api.failures import Reason
from finetune_trainer.errors import StageError

SUFFIXES = ("gz", "bz2", "xz", "zst")
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
LONGEST = max(map(len, MAGIC))


def compression(head: bytes) -> str | None:
    """The compression of a file that begins so."""
    return next((name for magic, name in MAGIC.items() if head.startswith(magic)), None)


def opened(path: Path, packed: str | None) -> IO[bytes]:
    """What is in the file, as a stream."""
    match packed:
        case "gzip":
            return cast("IO[bytes]", gzip.open(path))
        case "bz2":
            return bz2.open(path)
        case "xz":
            return lzma.open(path)
        case "zstd":
            return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd"))
    return path.open("rb")


@contextmanager
def blaming_the_file(name: str, packed: str | None) -> Iterator[None]:
    """A damaged stream is the file's fault: InvalidData. A disk's errors are not; they have a number."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError) as error:
        if packed is None or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise StageError(
            Reason.INVALID_DATA, f"{name}: the {packed} stream is damaged ({error}). Upload the file again."
        ) from error
