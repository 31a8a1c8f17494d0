"""Trained rows of the embeddings in the merged model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch

from finetune_api.failures import Reason
from finetune_api.results import TrainedTokens
from finetune_trainer.errors import StageError
from finetune_trainer.lora_files import TOKENS
from finetune_trainer.publish.adapter import Adapter
from finetune_trainer.publish.safetensors_stream import TensorInfo


def must_train(adapter: Adapter, tokens: TrainedTokens | None) -> None:
    """The adapter has rows of exactly the tokens that prepare found.

    Raises:
        StageError: VerificationFailed.
    """
    wanted = tuple(tokens.ids) if tokens is not None else ()
    found = set(adapter.tokens.values())
    if found != ({wanted} if wanted else set()):
        told = ", ".join(f"{len(ids)} rows of {name}" for name, ids in adapter.tokens.items()) or "none"
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the adapter has trained rows of other tokens than the data were prepared with: {told}, expected {len(wanted)} of each embedding.",
        )


def with_shared_head(adapter: Adapter, head: str | None) -> Adapter:
    """The adapter, with the embeddings' rows for the head too, where a base that shares their weights has stored them a second time.

    Training gives a head that stands apart rows of its own, so one without is shared.

    Args:
        head: its tensor in the files; that of the embeddings, if it is stored once.
    """
    if not adapter.tokens or head is None or head in adapter.tokens:
        return adapter
    (inputs,) = adapter.tokens
    keys = {**adapter.keys, rows_name(head): adapter.keys[rows_name(inputs)]}
    return replace(adapter, tokens={**adapter.tokens, head: adapter.tokens[inputs]}, keys=keys)


def grown(info: TensorInfo, ids: Sequence[int]) -> TensorInfo:
    """The tensor with room for the rows of new tokens, which must follow those that it has.

    Raises:
        StageError: VerificationFailed.
    """
    if not ids:
        return info
    rows = info.shape[0]
    beyond = [i for i in ids if i >= rows]
    if beyond != list(range(rows, rows + len(beyond))):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"{info.name} has {rows} rows in the base; the adapter's new ones, from {beyond[0]} to {beyond[-1]}, do not follow them.",
        )
    return replace(info, shape=(rows + len(beyond), *info.shape[1:]))


def with_rows(
    parts: Iterable[tuple[int, torch.Tensor]], ids: Sequence[int], values: torch.Tensor
) -> Iterator[tuple[int, torch.Tensor]]:
    """The parts of a tensor in float32 with the trained rows in their places, then the new ones.

    Args:
        parts: (first row, rows).
        ids: ascending.
        values: float32, shape (ids, hidden).
    """
    end = 0
    for start, rows in parts:
        end = start + len(rows)
        inside = [n for n, i in enumerate(ids) if start <= i < end]
        part = rows.float().clone() if inside else rows
        if inside:
            part[[ids[n] - start for n in inside]] = values[inside]
        yield start, part
    new = [n for n, i in enumerate(ids) if i >= end]
    if new:
        yield end, values[new]


def rows_name(tensor: str) -> str:
    """``model.embed_tokens.weight`` → the trained rows' name in an adapter."""
    return f"{tensor.removesuffix('.weight')}{TOKENS}"
