"""EVA (Paischer et al., 2024): an adapter's matrices A are the directions in which the layers' inputs vary most.

Not peft's own loop (0.21, tuners/lora/eva.py): it goes round the data until all layers have converged, and skips batches with fewer tokens than the
rank, so that with short rows and a high rank it never ends; and it gives layers with one input each other's ranks.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.incremental_pca import IncrementalPCA
from torch import nn

from finetune_trainer import heartbeat
from finetune_trainer.train.device import Compute
from finetune_trainer.train.evaluate import inference
from finetune_trainer.train.rows import Batch

log = logging.getLogger(__name__)

SIMILARITY = 0.99
"""Directions whose cosine with themselves a batch before is at least so much no longer change (peft's ``tau``)."""
SEED = 42
"""Of the randomized SVD."""


class Directions:
    """The directions in which one layer's inputs vary most, as far as they were seen.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self.settled = False
        self._count = count
        self._pca = IncrementalPCA(count, lowrank=True, lowrank_seed=SEED)
        self._waiting: list[torch.Tensor] = []

    def see(self, inputs: torch.Tensor) -> None:
        """More inputs: (tokens, features). They wait until there are as many as directions."""
        self._waiting.append(inputs)
        if sum(map(len, self._waiting)) < self._count:
            return
        before = getattr(self._pca, "components_", None)
        self._pca.partial_fit(torch.cat(self._waiting).float())
        self._waiting = []
        after = self._pca.components_
        self.settled = before is not None and bool(
            (torch.nn.functional.cosine_similarity(after, before) >= SIMILARITY).all()
        )

    def found(self) -> torch.Tensor:
        """(directions, features), the most important first: fewer where fewer tokens than that were seen."""
        seen = sum(map(len, self._waiting))
        if not hasattr(self._pca, "components_") and seen:
            self._pca = IncrementalPCA(seen, lowrank=True, lowrank_seed=SEED)
            self._pca.partial_fit(torch.cat(self._waiting).float())
        return getattr(self._pca, "components_", torch.empty(0))


def eva(model: PeftModel, data: Sequence[Batch], compute: Compute) -> None:
    """Look at the learned tokens of the data once, or until no direction changes. Every layer keeps its rank; what the data has too few
    tokens for is left as it was drawn."""
    adapter = model.active_adapter
    layers = {n: m for n, m in model.get_base_model().named_modules() if isinstance(m, LoraLayer)}
    with inference(model), compute.autocast(), model.disable_adapter():
        leaders = sharing_inputs(model, layers, data[0], compute)
        most: dict[str, int] = {}
        for name, module in layers.items():
            rank = min(module.r[adapter], module.in_features)
            most[leaders[name]] = max(most.get(leaders[name], 0), rank)
        directions = {leader: Directions(count) for leader, count in most.items()}
        for batch in data:
            heartbeat.beat()
            look(model, layers, directions, batch, compute)
            if all(found.settled for found in directions.values()):
                break
    found = {leader: seen.found() for leader, seen in directions.items()}
    few = 0
    for name, module in layers.items():
        weight = module.lora_A[adapter].weight.data
        own = found[leaders[name]][: len(weight)]
        weight[: len(own)] = own
        few += len(own) < min(weight.shape)
    if few:
        log.warning("EVA: the first rows have fewer learned tokens than %d layers have ranks; the rest is drawn", few)


def sharing_inputs(model: PeftModel, layers: dict[str, LoraLayer], batch: Batch, compute: Compute) -> dict[str, str]:
    """For each layer the first one with the same input, such as ``q_proj`` for ``v_proj``."""
    leaders: dict[str, str] = {}
    last: tuple[str, Any] = ("", None)

    def note(name: str, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        nonlocal last
        if inputs[0] is not last[1]:
            last = name, inputs[0]
        leaders[name] = last[0]

    with ExitStack() as hooked:
        for name, module in layers.items():
            hooked.callback(module.register_forward_pre_hook(partial(note, name)).remove)
        forward(model, batch, compute)
    return leaders


def look(
    model: PeftModel, layers: dict[str, LoraLayer], directions: dict[str, Directions], batch: Batch, compute: Compute
) -> None:
    """Show a batch's learned tokens to the layers that are not settled."""
    learned = ((batch["labels"] != -100) & batch["attention_mask"].bool()).reshape(-1).to(compute.device)

    def show(seen: Directions, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        seen.see(inputs[0].reshape(len(learned), -1)[learned])

    with ExitStack() as hooked:
        for name, seen in directions.items():
            if not seen.settled:
                hooked.callback(layers[name].register_forward_pre_hook(partial(show, seen)).remove)
        forward(model, batch, compute)


def forward(model: PeftModel, batch: Batch, compute: Compute) -> None:
    """Without logits: nothing is adapted behind the decoder."""
    inputs = {name: batch[name].to(compute.device) for name in ("input_ids", "attention_mask")}
    model.get_base_model().base_model(**inputs, use_cache=False)
