"""Kubernetes quantities of memory."""

from __future__ import annotations

import re

from finetune_cli.job_file import BadInput

QUANTITY = re.compile(r"^([0-9]+(?:\.[0-9]+)?)(|k|Ki|M|Mi|G|Gi|T|Ti)$")
UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40}


def parse_bytes(text: str) -> int:
    """``24Gi`` → bytes.

    Raises:
        BadInput: not a quantity.
    """
    found = QUANTITY.match(text.strip())
    if not found:
        raise BadInput(f"{text!r} is not a quantity of memory; expected one like 24Gi or 80G")
    return int(float(found[1]) * UNITS[found[2]])
