"""The combined adapter's model card: what it is made of."""

from __future__ import annotations

import re
from pathlib import Path

from finetune_api.combination import CombinationError, CombinationSnapshot, CombinedAdapter
from finetune_trainer.combine.sources import Source
from finetune_trainer.markdown import render
from finetune_trainer.s3 import S3Store
from finetune_trainer.vllm import max_lora_rank

TEMPLATE = Path(__file__).with_name("card.md.j2")
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def lineage(source: Source) -> CombinedAdapter:
    """Where an adapter came from, and which bytes it was."""
    return CombinedAdapter(
        uri=source.asked.uri,
        commit=source.commit,
        weight=source.asked.weight,
        rank=source.rank,
        modules=len(source.shapes),
        files=list(source.files),
    )


def model_card(
    snapshot: CombinationSnapshot,
    base: str,
    adapters: list[CombinedAdapter],
    rank: int,
    error: CombinationError,
    output: S3Store,
    tokenizer: bool,
) -> str:
    """README.md of ``adapter/``."""
    return render(
        TEMPLATE,
        job=snapshot.job,
        spec=snapshot.spec,
        base=base,
        base_id=base if _HUB_NAME.fullmatch(base) else None,
        adapters=adapters,
        rank=rank,
        vllm_rank=max_lora_rank(rank),
        error=error,
        adapter_uri=output.uri("adapter"),
        tokenizer=tokenizer,
    )
