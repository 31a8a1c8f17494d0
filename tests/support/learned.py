"""What an encoded row teaches."""

from __future__ import annotations

from typing import Any

from finetune_api.results import IGNORED
from finetune_trainer.prepare.encode import Encoded


def learned(tokenizer: Any, encoded: Encoded) -> list[str]:
    """Each run of learned tokens, decoded; every label is the token at its place."""
    runs: list[list[int]] = []
    before = IGNORED
    for token, label in zip(encoded.ids.tolist(), encoded.labels.tolist(), strict=True):
        assert label in (IGNORED, token)
        if label != IGNORED:
            runs = [*runs, [label]] if before == IGNORED else [*runs[:-1], [*runs[-1], label]]
        before = label
    return [tokenizer.decode(run) for run in runs]
