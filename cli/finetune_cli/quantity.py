"""Kubernetes quantities of memory, as people type them."""

from __future__ import annotations

from finetune_api.quantity import parse_quantity
from finetune_cli.job_file import BadInput


def parse_bytes(text: str) -> int:
    """``24Gi`` → bytes.

    Raises:
        BadInput: not a quantity of memory.
    """
    try:
        count = parse_quantity(text)
    except ValueError:
        count = None
    if count is None or text.strip().endswith("m"):
        raise BadInput(f"{text!r} is not a quantity of memory; expected one like 24Gi or 80G")
    return int(count)
