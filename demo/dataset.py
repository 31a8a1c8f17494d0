"""Builds the demo's dataset: questions about Kubernetes API fields, answered by the API documentation.

The documentation stands as field descriptions in the models of the PyPI package ``kubernetes`` (Apache-2.0). Exact and
near duplicates go first (the same sentence documents a field in many kinds), and only then are rows held out, so that no
held-out answer, and none that is nearly the same, stands in train. What is left of overlap is measured and reported.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel

SYSTEM = "You explain the Kubernetes API."
NEAR_DUPLICATE = 0.6
"""Jaccard similarity of two answers' word trigrams above which they count as near duplicates."""
MIN_WORDS, MAX_WORDS = 6, 32


@dataclass(frozen=True)
class Pair:
    """One question about a field and its documented answer."""

    kind: str
    field: str
    answer: str

    @property
    def question(self) -> str:
        """What the user asks."""
        return f"What is `{self.field}` in {self.kind}?"

    def row(self) -> dict[str, object]:
        """The row in messages format."""
        return {
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": self.question},
                {"role": "assistant", "content": self.answer},
            ]
        }


@dataclass(frozen=True)
class DatasetReport:
    """What was built, and how far held-out and train are apart."""

    documented_fields: int
    exact_duplicates: int
    near_duplicates: int
    train_rows: int
    held_out_rows: int
    exact_overlap: int
    highest_similarity: float

    def __str__(self) -> str:
        return (
            f"{self.documented_fields:,} documented fields; {self.exact_duplicates:,} exact and "
            f"{self.near_duplicates:,} near duplicates removed; {self.train_rows} train, {self.held_out_rows} held out; "
            f"overlap: {self.exact_overlap} answers shared, highest similarity {self.highest_similarity:.2f}"
        )


def documented_fields() -> Iterator[Pair]:
    """Every documented field of the v1 kinds, in a stable order."""
    package = importlib.import_module("kubernetes.client.models")
    for module_info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        if not module_info.name.startswith("v1_"):
            continue
        module = importlib.import_module(f"kubernetes.client.models.{module_info.name}")
        for name, model in sorted(vars(module).items()):
            if not (isinstance(model, type) and issubclass(model, BaseModel) and model.__module__ == module.__name__):
                continue
            for field_name, field in model.model_fields.items():
                answer = first_sentence(field.description or "")
                if answer:
                    yield Pair(name.removeprefix("V1"), field.serialization_alias or field_name, answer)


def first_sentence(text: str) -> str:
    """The first sentence, without the field's own name before it; empty if too short or too long to teach from."""
    text = re.sub(r"\s+", " ", text).strip()
    sentence = re.split(r"(?<=[.!?]) (?=[A-Z\"'])", text)[0]
    words = sentence.split()
    return sentence if MIN_WORDS <= len(words) <= MAX_WORDS else ""


def trigrams(text: str) -> frozenset[tuple[str, ...]]:
    """Word trigrams, lower case, letters and digits only."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return frozenset(tuple(words[i : i + 3]) for i in range(len(words) - 2))


def similarity(a: frozenset[tuple[str, ...]], b: frozenset[tuple[str, ...]]) -> float:
    """Jaccard index."""
    return len(a & b) / len(a | b) if a and b else 0.0


def highest_similarity(
    answer: frozenset[tuple[str, ...]], index: dict[tuple[str, ...], list[int]], grams: list[frozenset[tuple[str, ...]]]
) -> float:
    """Similarity to the nearest of the indexed answers."""
    candidates = {i for gram in answer for i in index.get(gram, ())}
    return max((similarity(answer, grams[i]) for i in candidates), default=0.0)


def without_duplicates(pairs: Iterable[Pair]) -> tuple[list[Pair], int, int]:
    """The pairs with pairwise different answers; how many exact and near duplicates were left out."""
    kept: list[Pair] = []
    seen: set[str] = set()
    grams: list[frozenset[tuple[str, ...]]] = []
    index: dict[tuple[str, ...], list[int]] = {}
    exact = near = 0
    for pair in pairs:
        if pair.answer in seen:
            exact += 1
            continue
        seen.add(pair.answer)
        own = trigrams(pair.answer)
        if highest_similarity(own, index, grams) >= NEAR_DUPLICATE:
            near += 1
            continue
        for gram in own:
            index.setdefault(gram, []).append(len(grams))
        grams.append(own)
        kept.append(pair)
    return kept, exact, near


def build(folder: Path, train_rows: int = 480, held_out_rows: int = 48, seed: int = 7) -> DatasetReport:
    """Write train.jsonl and held_out.jsonl into ``folder``."""
    documented = list(documented_fields())
    pairs, exact, near = without_duplicates(documented)
    random.Random(seed).shuffle(pairs)
    held_out, train = pairs[:held_out_rows], pairs[held_out_rows : held_out_rows + train_rows]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train.jsonl", train), ("held_out.jsonl", held_out)):
        (folder / name).write_text("".join(json.dumps(p.row(), ensure_ascii=False) + "\n" for p in rows))
    grams = [trigrams(p.answer) for p in train]
    index: dict[tuple[str, ...], list[int]] = {}
    for i, own in enumerate(grams):
        for gram in own:
            index.setdefault(gram, []).append(i)
    return DatasetReport(
        documented_fields=len(documented),
        exact_duplicates=exact,
        near_duplicates=near,
        train_rows=len(train),
        held_out_rows=len(held_out),
        exact_overlap=len({p.answer for p in train} & {p.answer for p in held_out}),
        highest_similarity=max(highest_similarity(trigrams(p.answer), index, grams) for p in held_out),
    )
