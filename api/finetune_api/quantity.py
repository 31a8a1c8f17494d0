"""Kubernetes quantities, exactly: no rounding between what somebody wrote and what a pod asks for."""

from __future__ import annotations

import math
import re
from fractions import Fraction

_QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(|m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)$")
_BINARY = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "Pi": 2**50}
_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "P": 10**15, **_BINARY}


def parse_quantity(text: str) -> Fraction:
    """``24Gi`` → 25769803776, ``500m`` → 1/2.

    Raises:
        ValueError: not a quantity.
    """
    found = _QUANTITY.match(text.strip())
    if not found:
        raise ValueError(f"{text!r} is not a quantity; expected one like 24Gi or 80G")
    unit = Fraction(1, 1000) if found[2] == "m" else Fraction(_UNITS[found[2]])
    return Fraction(found[1]) * unit


def bytes_quantity(count: int) -> str:
    """A number of bytes with the largest binary unit of which it is a multiple: ``6442450944`` → ``6Gi``."""
    for suffix, unit in reversed(_BINARY.items()):
        if count and count % unit == 0:
            return f"{count // unit}{suffix}"
    return str(count)


def grown_memory(memory: str, limit: str | None, times: int) -> str:
    """``memory`` × 1.5 ** ``times``, at most ``limit``; without a limit it never grows."""
    if limit is None or times <= 0 or parse_quantity(memory) >= parse_quantity(limit):
        return memory
    wanted = parse_quantity(memory) * Fraction(3, 2) ** times
    return limit if wanted >= parse_quantity(limit) else bytes_quantity(math.ceil(wanted))


def human_bytes(count: int) -> str:
    """``3.9 GiB``, for people."""
    for suffix, unit in reversed(_BINARY.items()):
        if count >= unit:
            return f"{count / unit:.1f} {suffix}B"
    return f"{count} B"
