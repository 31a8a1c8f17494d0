"""Rows of the embeddings: room for new tokens, and those rows that are trained."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from finetune_api.failures import Reason
from finetune_api.results import TrainedTokens
from finetune_trainer.errors import StageError
from finetune_trainer.train.ranks import Ranks

ROWS = ".trainable_tokens_delta."
"""In the names of parameters: peft's copies of the rows that are trained, which take the place of the base's in each forward pass."""


def make_room(base: Any, tokens: TrainedTokens | None, ranks: Ranks) -> None:
    """Resize the embeddings for the new tokens, whose rows become the mean of all others', in float32.

    transformers draws new rows from a normal distribution around that mean, with a billionth of the variance: here all ranks and
    executions have the same. The adapter's rows take their place, so nobody who loads it needs them.
    """
    new = [token.id for token in tokens.tokens if token.new] if tokens is not None else []
    if tokens is None or not new:
        return
    if tokens.resized_to is not None:
        base.resize_token_embeddings(tokens.resized_to, mean_resizing=False)
    weights = [module.weight for module in embedding_modules(base).values()]
    means = ranks.share(lambda: [w.detach()[: new[0]].mean(0, dtype=torch.float32).cpu() for w in weights])
    for weight, mean in zip(weights, means, strict=True):
        weight.data[new] = mean.to(weight)
    base.requires_grad_(False)


def embedding_modules(base: Any) -> dict[str, Any]:
    """Input embeddings and, where it does not share their weights, the output head, by name."""
    inputs, head = base.get_input_embeddings(), base.get_output_embeddings()
    wanted = [inputs] if head is None or head.weight is inputs.weight else [inputs, head]
    return {name: module for name, module in base.named_modules() if any(module is each for each in wanted)}


def trained_rows(base: Any, ids: Sequence[int]) -> dict[str, list[int]] | None:
    """peft's ``trainable_token_indices``. A head that shares the embeddings' weights gets their rows from peft."""
    return {name: list(ids) for name in embedding_modules(base)} if ids else None


def check_ids(tokenizer: Any, tokens: TrainedTokens | None) -> None:
    """The tokenizer has the trained tokens where prepare had them.

    Raises:
        StageError: VerificationFailed.
    """
    for token in tokens.tokens if tokens is not None else []:
        found = tokenizer.convert_tokens_to_ids(token.token) if token.new else token.id
        if found != token.id:
            raise StageError(
                Reason.VERIFICATION_FAILED,
                f"{token.token!r} is token {found} of the tokenizer; the data were prepared with {token.id}.",
            )
