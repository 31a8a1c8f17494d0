"""A LoRA adapter as a file, read without peft: this is the second opinion on what the adapter does. And full weights, in the same form."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from finetune_api.failures import Reason
from finetune_api.results import WEIGHTS_FILE, TrainedWeights
from finetune_api.targets import as_peft_reads, is_named
from finetune_trainer.errors import StageError
from finetune_trainer.lora_files import (
    CONFIG,
    LORA_A,
    LORA_B,
    MAGNITUDE,
    TOKENS,
    WEIGHTS,
    adapted_modules,
    expert_keys,
    strange_settings,
    tensor_name,
)
from finetune_trainer.publish.safetensors_stream import module_of, rows_per_chunk
from finetune_trainer.publish.stored_weights import Part, StoredWeights

EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
"""In the files of the models whose own weights are trained (prepare refuses others)."""


@dataclass(frozen=True)
class Lora:
    """One module's update, ΔW = scaling · B · A, both float32: A (rank, inputs), B (outputs, rank). With DoRA (Liu et al., 2024) each row of
    W + ΔW is brought to its trained magnitude (outputs)."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    magnitude: torch.Tensor | None = None

    def rows(self, start: int, count: int) -> Lora:
        """The update of some rows of the weight."""
        part = slice(start, start + count)
        return replace(self, b=self.b[part], magnitude=None if self.magnitude is None else self.magnitude[part])

    def sum_with(self, weight: torch.Tensor) -> torch.Tensor:
        """W + ΔW, in float32."""
        return weight.float() + (self.b @ self.a).mul_(self.scaling)

    def merged(self, weight: torch.Tensor) -> torch.Tensor:
        """What takes the weight's place, in float32."""
        total = self.sum_with(weight)
        return total if self.magnitude is None else total.mul_(self.factor(total)[:, None])

    def factor(self, total: torch.Tensor) -> torch.Tensor:
        """By what each row of W + ΔW is multiplied; ones without DoRA."""
        if self.magnitude is None:
            return torch.ones(len(total))
        norms: torch.Tensor = torch.linalg.norm(total, dim=1)
        return self.magnitude / norms


@dataclass(frozen=True)
class Adapter:
    """Updates by module name, and base tensors that the adapter replaces (trained biases), by tensor name."""

    folder: Path
    modules: Mapping[str, float]
    """With the scaling of each."""
    replaced: frozenset[str]
    keys: dict[str, str]
    """Tensor names of the base's vocabulary to the file's keys."""
    file: str = WEIGHTS
    words: str = "base + adapter"
    """What base and this are together, for messages."""
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Base tensors of which it replaces rows, or to which it adds some: those of trained tokens, ascending."""
    experts: Mapping[str, float] = field(default_factory=dict)
    """Parameters of all of a layer's experts with an update for each, by name, with the scaling; none once the adapter is in the files' words."""
    rank: int = 0
    """Of experts' updates."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    """Of ``modules``, the single experts', with their places in these parameters."""

    def lora(self, module: str) -> Lora:
        """The update of a module."""
        if module in self.parts:
            return self._of_expert(module)
        magnitude = self._read(f"{module}{MAGNITUDE}") if f"{module}{MAGNITUDE}" in self.keys else None
        a, b = self._read(f"{module}{LORA_A}"), self._read(f"{module}{LORA_B}")
        return Lora(a, b, self.modules[module], magnitude)

    def _of_expert(self, module: str) -> Lora:
        """peft (0.21, ParamWrapper.get_delta_weight) keeps A as (experts · rank, inputs) and B as (outputs, rank · experts)."""
        part, scaling = self.parts[module], self.modules[module]
        first = part.expert * self.rank
        with safe_open(self.folder / self.file, "pt") as file:
            a = file.get_slice(self.keys[f"{part.parameter}{LORA_A}"])[first : first + self.rank].float()
            whole = file.get_slice(self.keys[f"{part.parameter}{LORA_B}"])
            rows = whole.get_shape()[0] // part.halves
            b = whole[part.half * rows : (part.half + 1) * rows].float()
        return Lora(a, b.reshape(rows, self.rank, part.experts)[:, :, part.expert].contiguous(), scaling)

    def replacement(self, tensor: str) -> torch.Tensor:
        """The trained values of a base tensor."""
        return self._read(tensor)

    def token_rows(self, tensor: str) -> torch.Tensor:
        """The trained rows of a base tensor, in the order of ``tokens``."""
        return self._read(f"{tensor.removesuffix('.weight')}{TOKENS}")

    def replaced_rows(self, tensor: str) -> Iterator[tuple[int, torch.Tensor]]:
        """The same in parts: (first row, rows)."""
        with safe_open(self.folder / self.file, "pt") as file:
            values = file.get_slice(self.keys[tensor])
            shape = tuple(values.get_shape())
            step = rows_per_chunk(shape)
            for start in range(0, shape[0], step):
                yield start, values[start : start + step].float()

    def repeats(self, tensor: str, others: Iterable[str]) -> bool:
        """Whether it is the same as one of the others: peft writes a head that is tied to trained embeddings once more."""
        return tensor in self.replaced and any(
            all(
                torch.equal(a, b)
                for (_, a), (_, b) in zip(self.replaced_rows(tensor), self.replaced_rows(o), strict=True)
            )
            for o in others
            if o in self.replaced and self._shape(o) == self._shape(tensor)
        )

    def _shape(self, tensor: str) -> tuple[int, ...]:
        with safe_open(self.folder / self.file, "pt") as file:
            return tuple(file.get_slice(self.keys[tensor]).get_shape())

    def _read(self, name: str) -> torch.Tensor:
        with safe_open(self.folder / self.file, "pt") as file:
            return file.get_tensor(self.keys[name]).float()  # type: ignore[no-any-return]


def read_weights(folder: Path, weights: TrainedWeights, stored: Collection[str], tied: bool) -> Adapter:
    """Full weights as an adapter that replaces tensors of the base and adds to none.

    Args:
        stored: names of the base's tensors.
        tied: its head is its embedding; files that have both get the trained values twice.

    Raises:
        StageError: VerificationFailed, if other tensors are there than were trained.
    """
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        keys = {name: name for name in file.keys()}  # noqa: SIM118 - not a dict
    if keys.keys() != set(weights.tensors):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the file of trained weights has {len(keys)} tensors; {len(weights.tensors)} were trained.",
        )
    if tied and EMBEDDINGS in keys and HEAD in stored:
        keys[HEAD] = EMBEDDINGS
    return Adapter(folder, {}, frozenset(keys), keys, WEIGHTS_FILE, "base and trained weights")


def read_adapter(folder: Path) -> Adapter:
    """Read the configuration and the names.

    Raises:
        StageError: VerificationFailed, if the adapter is not a plain LoRA adapter.
    """
    config: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    if config.get("peft_type") != "LORA":
        raise StageError(
            Reason.VERIFICATION_FAILED, f"the adapter's peft_type is {config.get('peft_type')!r}, not LORA."
        )
    with safe_open(folder / WEIGHTS, "pt") as file:
        layers = adapted_modules(file.keys())
    if strange := strange_settings(config, layers):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the adapter's configuration sets {', '.join(strange)}, which cannot be merged.",
        )
    rank, alpha = config["r"], config["lora_alpha"]
    with safe_open(folder / WEIGHTS, "pt") as file:
        experts = expert_keys(file.keys(), config.get("target_parameters") or ())
        names = {k: tensor_name(k) for k in file.keys() if k not in experts.values()}  # noqa: SIM118 - not a dict
        sizes = {name: tuple(file.get_slice(key).get_shape()) for name, key in experts.items()}
        ranks = {
            n.removesuffix(LORA_A): file.get_slice(k).get_shape()[0] for k, n in names.items() if n.endswith(LORA_A)
        }
    keys = {name: key for key, name in names.items()}
    modules = ranks.keys()
    configured = dict.fromkeys(modules, rank) | as_peft_reads(modules, config.get("rank_pattern") or {})
    halves = {n.removesuffix(LORA_B) for n in keys if n.endswith(LORA_B)}
    magnitudes = {n.removesuffix(MAGNITUDE) for n in keys if n.endswith(MAGNITUDE)}
    wanted = modules if config.get("use_dora") else set()
    if not modules or modules != halves or ranks != configured or magnitudes != wanted:
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the adapter is not whole: {len(modules)} lora_A, {len(halves)} lora_B and {len(magnitudes)} magnitude tensors, ranks "
            f"{sorted(set(ranks.values()))}, configured {sorted(set(configured.values()))}{', with DoRA' if wanted else ''}.",
        )
    root = math.sqrt if config.get("use_rslora") else float
    alphas = dict.fromkeys(modules, alpha) | as_peft_reads(modules, config.get("alpha_pattern") or {})
    scalings = {m: alphas[m] / root(ranks[m]) for m in modules}
    replaced = frozenset(n for n in keys if ".lora_" not in n and not n.endswith(TOKENS))
    return Adapter(
        folder,
        scalings,
        replaced,
        keys | experts,
        tokens=token_indices(folder, config, keys),
        experts=dict.fromkeys(whole_experts(sizes, config), alpha / root(rank)),
        rank=rank,
    )


def whole_experts(sizes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> list[str]:
    """The parameters of experts that have an update, each A with its B.

    Args:
        sizes: by the parameter's name and half.

    Raises:
        StageError: VerificationFailed, if one is missing, or of another rank than the configured one.
    """
    found = sorted({name.removesuffix(LORA_A).removesuffix(LORA_B) for name in sizes})
    rank = config["r"]
    named = config.get("target_parameters") or ()
    for name in found:
        a, b = sizes.get(f"{name}{LORA_A}", (0, 0)), sizes.get(f"{name}{LORA_B}", (0, 0))
        if not a[0] or a[0] != b[1] or a[0] % rank:
            raise StageError(
                Reason.VERIFICATION_FAILED,
                f"the adapter is not whole: of {name} it has A {list(a)} and B {list(b)}, with rank {rank}.",
            )
    if missing := [each for each in named if not any(is_named(name, [each]) for name in found)]:
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the adapter is not whole: it has no update of {missing[0]}, which its target_parameters name.",
        )
    return found


def in_files(adapter: Adapter, stored: StoredWeights) -> Adapter:
    """The same adapter by the names that the base's files have.

    Raises:
        StageError: VerificationFailed, if it has updates of other experts than the base has.
    """
    tensors = stored.alone
    parts = {module_of(name): part for name, part in stored.parts.items() if part.parameter in adapter.experts}
    if unknown := adapter.experts.keys() - {part.parameter for part in parts.values()}:
        raise StageError(
            Reason.VERIFICATION_FAILED, f"the adapter has an update of {min(unknown)}; the base has no such experts."
        )

    def module(name: str) -> str:
        return module_of(tensors.get(f"{name}.weight", f"{name}.weight"))

    def renamed(name: str) -> str:
        for suffix in (LORA_A, LORA_B, MAGNITUDE, TOKENS):
            if name.endswith(suffix):
                return module(name.removesuffix(suffix)) + suffix
        return tensors.get(name, name)

    return replace(
        adapter,
        modules={module(name): scaling for name, scaling in adapter.modules.items()}
        | {name: adapter.experts[part.parameter] for name, part in parts.items()},
        experts={},
        parts=parts,
        replaced=frozenset(map(renamed, adapter.replaced)),
        keys={renamed(name): key for name, key in adapter.keys.items()},
        tokens={renamed(name): ids for name, ids in adapter.tokens.items()},
    )


def token_indices(folder: Path, config: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Trained tokens by base tensor.

    Raises:
        StageError: VerificationFailed, if the file has not a row for each.
    """
    configured: dict[str, list[int]] = config.get("trainable_token_indices") or {}
    with safe_open(folder / WEIGHTS, "pt") as file:
        found = {
            n.removesuffix(TOKENS): file.get_slice(k).get_shape()[0] for n, k in keys.items() if n.endswith(TOKENS)
        }
    if found != {name: len(ids) for name, ids in configured.items()} or any(
        ids != sorted(set(ids)) for ids in configured.values()
    ):
        raise StageError(
            Reason.VERIFICATION_FAILED,
            f"the adapter is not whole: it has trained rows of {found or 'no embedding'}, and is configured for "
            f"{ {name: len(ids) for name, ids in configured.items()} or 'none' }.",
        )
    return {f"{name}.weight": tuple(ids) for name, ids in configured.items()}
