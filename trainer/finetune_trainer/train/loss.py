"""Negative log-likelihood of the learned tokens, and which of them a model would say itself, without the logits of all the others."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finetune_api.planner.architecture import LOGIT_SETTINGS, SOFTCAP
from finetune_api.planner.loss_memory import CHUNK_BYTES, WHOLE_LOGITS_BYTES
from finetune_api.results import IGNORED
from finetune_trainer.train.rows import Batch

log = logging.getLogger(__name__)
PerToken = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Of logits (tokens, vocabulary), or of what the head makes them of, and targets (tokens,): a value, or several, for each token."""


def head_stands_apart(config: Any) -> bool:
    """Whether, by a model's configuration, its logits are what its head gives (capped, where it caps them)."""
    return all(getattr(config.get_text_config(), name, None) in (None, 1.0) for name in LOGIT_SETTINGS)


class LearnedTokenLoss:
    """Σ NLL over the learned tokens of a batch, natural logarithm, float32.

    Only positions that predict a learned token go through the language-model head, a chunk at a time: with a vocabulary of
    128k, the logits of 8k tokens are 4 GiB in float32, twice that with their gradient, and most are prompt or padding.

    Calling the decoder and the head apart skips what some models do to their logits. Gemma's capping is done here; others
    (Granite divides, Cohere multiplies) are known by their configuration, and whether it holds is tried on a few tokens first.
    Where it does not, the model's own forward is used.
    """

    def __init__(self, causal_lm: Any, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.model = causal_lm
        self.head: nn.Module = causal_lm.get_output_embeddings()
        config = causal_lm.config.get_text_config()
        self.vocabulary = int(config.vocab_size)
        self.chunk_tokens = max(1, chunk_bytes // (4 * self.vocabulary))
        self.softcap: float | None = getattr(config, SOFTCAP, None)
        self.head_apart: bool | None = None if head_stands_apart(causal_lm.config) else False

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Scalar, float32, differentiable. Zero (and connected to the graph) where nothing is learned."""
        return self.per_token(batch).sum()

    def per_token(self, batch: Batch) -> torch.Tensor:
        """NLL of each learned token, row after row: float32, shape (learned tokens,)."""
        return self._of_learned(batch, _nll_of_logits)

    def nll_and_right(self, batch: Batch) -> torch.Tensor:
        """NLL of each learned token, and 1 where it is the most likely one, else 0: float32, shape (learned tokens, 2)."""
        return self._of_learned(batch, _nll_and_right_of_logits)

    def _of_learned(self, batch: Batch, per_token_of_logits: PerToken) -> torch.Tensor:
        apart = self._stands_apart(batch["input_ids"])
        labels = batch["labels"][:, 1:]
        learned = labels != IGNORED
        inputs = {**{name: value for name, value in batch.items() if name != "labels"}, "use_cache": False}
        of_rows: PerToken = partial(self._of_hidden, per_token_of_logits) if apart else per_token_of_logits
        rows = self.model.base_model(**inputs).last_hidden_state if apart else self.model(**inputs).logits
        rows = rows[:, :-1][learned]
        if rows.requires_grad:
            # The gradient of its input is the last that the head's backward pass makes.
            rows.register_hook(lambda _: release(self.head))
        found = self._in_chunks(of_rows, rows, labels[learned])
        if not found.requires_grad:
            release(self.head)
        return found

    def _in_chunks(self, of_rows: PerToken, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if len(targets) <= self.chunk_tokens:
            return of_rows(rows, targets)
        parts = zip(torch.split(rows, self.chunk_tokens), torch.split(targets, self.chunk_tokens), strict=True)
        if torch.is_grad_enabled():
            # Recomputed in the backward pass, so that one chunk's float32 logits exist at a time there too.
            return torch.cat([checkpoint(of_rows, r, t, use_reentrant=False) for r, t in parts])
        return torch.cat([of_rows(r, t) for r, t in parts])

    def batch_tokens(self, ids: torch.Tensor, most: int) -> int:
        """How many tokens a batch may have, padding included, so that its logits stay within a gibibyte; ``ids`` are a few to try.

        Only where the model's own forward is needed: elsewhere logits exist a chunk at a time. A row that is longer goes alone.
        """
        if self._stands_apart(ids):
            return most
        # The logits as computed, those of the learned positions, and float32 in between.
        return max(1, min(most, WHOLE_LOGITS_BYTES // (8 * self.vocabulary)))

    def _stands_apart(self, ids: torch.Tensor) -> bool:
        if self.head_apart is None:
            self.head_apart = self._head_can_stand_apart(ids[:1, :8])
        return self.head_apart

    def _of_hidden(self, per_token_of_logits: PerToken, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return per_token_of_logits(self._logits(hidden), targets)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32, capped where the model caps."""
        logits: torch.Tensor = self.head(hidden).float()
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap

    @torch.no_grad()
    def _head_can_stand_apart(self, ids: torch.Tensor) -> bool:
        training = self.model.training
        self.model.eval()
        try:
            whole = self.model(input_ids=ids, use_cache=False).logits.float()
            apart = self._logits(self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        finally:
            self.model.train(training)
        same = whole.shape == apart.shape and torch.allclose(whole, apart, rtol=1e-2, atol=1e-2)
        if not same:
            log.warning(
                "%s changes its logits after the head: training needs all logits at once", type(self.model).__name__
            )
        return bool(same)


def release(head: nn.Module) -> None:
    """Let go of a sharded head. It stays whole from its first chunk to its last: ranks have different numbers of chunks, and must put it
    together equally often."""
    if isinstance(head, FSDPModule):
        head.reshard()


def _nll_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.float(), targets, reduction="none")


def _nll_and_right_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    right = logits.argmax(-1) == targets
    return torch.stack([_nll_of_logits(logits, targets), right.float()], 1)


def learned_tokens(labels: torch.Tensor) -> int:
    """How many tokens of a batch are predicted and learned."""
    return int((labels[:, 1:] != IGNORED).sum())
