"""Memory of the head and the loss: finetune_trainer.train.loss computes logits of learned tokens a chunk at a time."""

from __future__ import annotations

from finetune_api.planner.architecture import Architecture

CHUNK_BYTES = 256 << 20
"""Most memory that one chunk of float32 logits may take."""
WHOLE_LOGITS_BYTES = 1 << 30
"""Most memory for an evaluated batch's logits where they come all at once: 512 tokens at a vocabulary of 256k."""
FULL = 4


def chunk_tokens(arch: Architecture, tokens: int) -> int:
    """Tokens whose logits exist at one time."""
    return min(tokens, max(1, CHUNK_BYTES // (FULL * arch.vocabulary_size)))


def training_loss_bytes(arch: Architecture, tokens: int) -> int:
    """The most that head and loss need at one time, every token being learned.

    A chunk's log-probabilities (kept by log_softmax), the gradient that nll_loss makes of them, and the one that log_softmax
    makes of that: three times float32 × tokens × vocabulary. Where logits are capped (Gemma 2), tanh keeps its result beside them.
    Where a model changes its logits in a way of its own (Granite, Cohere), there are no chunks, and they stay in half precision too.
    """
    if arch.logits_changed:
        return (3 * FULL + 2) * tokens * arch.vocabulary_size
    return (3 + arch.logits_capped) * FULL * chunk_tokens(arch, tokens) * arch.vocabulary_size


def evaluation_loss_bytes(arch: Architecture, tokens: int) -> int:
    """The same without gradients: float32 logits and log-probabilities (and those before the cap), or where logits are changed
    those in half precision too."""
    if arch.logits_changed:
        return (2 * FULL + 2) * tokens * arch.vocabulary_size
    return (2 + arch.logits_capped) * FULL * chunk_tokens(arch, tokens) * arch.vocabulary_size


def evaluated_tokens(arch: Architecture, most: int) -> int:
    """Tokens of an evaluation batch: fewer where all logits come at once (LearnedTokenLoss.batch_tokens)."""
    return max(1, min(most, WHOLE_LOGITS_BYTES // (2 * FULL * arch.vocabulary_size))) if arch.logits_changed else most
