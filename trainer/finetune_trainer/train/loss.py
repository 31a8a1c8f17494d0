"""Negative log-likelihood of the learned tokens, without the logits of all the others."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from finetune_trainer.train.rows import IGNORED, Batch

log = logging.getLogger(__name__)

CHUNK_BYTES = 256 << 20
"""Most memory that one chunk of float32 logits may take."""
LOGIT_SETTINGS = (
    "final_logit_softcapping",
    "logit_scale",
    "logits_scaling",
    "lm_head_multiplier",
    "output_multiplier",
)
"""Settings by which models change their logits after the head (transformers 5.23)."""


def head_stands_apart(config: Any) -> bool:
    """Whether, by a model's configuration, its logits are what its head gives."""
    return all(getattr(config.get_text_config(), name, None) in (None, 1.0) for name in LOGIT_SETTINGS)


class LearnedTokenLoss:
    """Σ NLL over the learned tokens of a batch, natural logarithm, float32.

    Only positions that predict a learned token go through the language-model head, a chunk at a time: with a vocabulary of
    128k, the logits of 8k tokens are 4 GiB in float32, twice that with their gradient, and most are prompt or padding.

    Calling the decoder and the head apart skips what some models do to their logits (Gemma caps, Granite divides). Those
    are known by their configuration; for others it is tried on a few tokens first. Where it does not hold, the model's own
    forward is used.
    """

    def __init__(self, causal_lm: Any, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.model = causal_lm
        self.head: nn.Module = causal_lm.get_output_embeddings()
        config = causal_lm.config.get_text_config()
        self.chunk_tokens = max(1, chunk_bytes // (4 * config.vocab_size))
        self.head_apart: bool | None = None if head_stands_apart(causal_lm.config) else False

    def __call__(self, batch: Batch) -> torch.Tensor:
        """Scalar, float32, differentiable. Zero (and connected to the graph) where nothing is learned."""
        return self.per_token(batch).sum()

    def per_token(self, batch: Batch) -> torch.Tensor:
        """NLL of each learned token, row after row: float32, shape (learned tokens,)."""
        if self.head_apart is None:
            self.head_apart = self._head_can_stand_apart(batch["input_ids"][:1, :8])
        labels = batch["labels"][:, 1:]
        learned = labels != IGNORED
        inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "use_cache": False}
        if not self.head_apart:
            logits = self.model(**inputs).logits[:, :-1]
            return F.cross_entropy(logits[learned].float(), labels[learned], reduction="none")
        hidden = self.model.base_model(**inputs).last_hidden_state[:, :-1][learned]
        targets = labels[learned]
        if len(targets) <= self.chunk_tokens:
            return self._nll(hidden, targets)
        parts = zip(torch.split(hidden, self.chunk_tokens), torch.split(targets, self.chunk_tokens), strict=True)
        if torch.is_grad_enabled():
            # Recomputed in the backward pass, so that one chunk's logits exist at a time there too.
            return torch.cat([checkpoint(self._nll, h, t, use_reentrant=False) for h, t in parts])
        return torch.cat([self._nll(h, t) for h, t in parts])

    def _nll(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.head(hidden).float(), targets, reduction="none")

    @torch.no_grad()
    def _head_can_stand_apart(self, ids: torch.Tensor) -> bool:
        training = self.model.training
        self.model.eval()
        try:
            whole = self.model(input_ids=ids, use_cache=False).logits.float()
            apart = self.head(self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state).float()
        finally:
            self.model.train(training)
        same = whole.shape == apart.shape and torch.allclose(whole, apart, rtol=1e-2, atol=1e-2)
        if not same:
            log.warning(
                "%s changes its logits after the head: training needs all logits at once", type(self.model).__name__
            )
        return bool(same)


def learned_tokens(labels: torch.Tensor) -> int:
    """How many tokens of a batch are predicted and learned."""
    return int((labels[:, 1:] != IGNORED).sum())
