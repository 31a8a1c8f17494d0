"""What vLLM serves of adapters."""

from __future__ import annotations

RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM takes as ``--max-lora-rank`` (``vllm/config/lora.py``)."""


def max_lora_rank(rank: int) -> int | None:
    """The least of RANKS that an adapter of this rank may be served with; None above the last."""
    return next((allowed for allowed in RANKS if allowed >= rank), None)
