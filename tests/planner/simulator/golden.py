"""Golden files: simulated peaks over a grid. ``python -m tests.planner.simulator.golden [model ...]`` writes them anew.

They come from the simulation alone; nothing of the planner is imported here.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from tests.planner.simulator.step import Case, Simulated, simulate

FOLDER = Path(__file__).parent.parent
EVALUATION_TOKENS = 16384
EAGER_ONLY = ("gemma-2-2b",)
"""Models whose attention cannot run by sdpa: transformers refuses to cap scores there."""
MODELS = {
    "smollm2-135m": 2048,
    "llama-3-8b": 8192,
    "gpt2": 1024,
    "pythia-1.4b": 2048,
    "qwen3-0.6b": 4096,
    "gemma-3-1b": 4096,
    "gemma-2-2b": 4096,
    "falcon-7b": 2048,
    "phi-3-mini": 4096,
    "qwen2.5-0.5b": 4096,
    "llama-3.2-1b": 4096,
    "mistral-7b": 8192,
    "phi-4": 4096,
    "llama-3-70b": 4096,
    "qwen3-8b": 4096,
    "llama-2-7b": 4096,
    "qwen2-7b": 4096,
}
"""Models of the grid and the longest rows they are simulated with."""
HELD_OUT = {"smollm2-1.7b": 4096, "gpt2-xl": 1024, "llama-2-13b": 4096, "gemma-2-9b": 2048, "qwen2.5-32b": 4096}
"""Models and settings that were simulated only after the planner's formulas were settled on the grid above."""


def grid(model: str) -> Iterator[Case]:
    """Both methods, rows alone and padded batches, with and without checkpointing, both kinds of attention."""
    longest = MODELS[model]
    for quantized, rows, tokens, checkpointing, attention in (
        (False, 1, 2048, True, "sdpa"),
        (True, 1, 2048, True, "sdpa"),
        (False, 4, 512, False, "sdpa"),
        (True, 4, 512, False, "sdpa"),
        (False, 2, 1024, True, "eager"),
        (True, 1, 1024, False, "eager"),
        (True, 8, 2048, True, "sdpa"),
        (False, 1, 4096, False, "sdpa"),
    ):
        if model == "llama-3-70b" and not (quantized and checkpointing):
            continue
        kind = "eager" if model in EAGER_ONLY else attention
        yield Case(model, quantized, min(tokens, longest), rows, checkpointing, kind)
    if model in ("gpt2", "pythia-1.4b"):
        yield Case(model, True, 1024, 1, True, "eager")  # float32 hidden states in eager attention
    if model in ("llama-3-8b", "smollm2-135m"):
        yield Case(model, True, 512, 1, True)
        yield Case(model, True, longest, 1, True)
        yield Case(model, False, 1024, 4, False, dropout=0.0)
        yield Case(model, True, 1024, 4, False, dropout=0.0)
        yield Case(model, True, 1024, 4, True, double_quantization=False)
        yield Case(model, False, 1024, 1, False, target_modules=("q_proj", "v_proj"), rank=8)
        yield Case(model, True, 1024, 2, False, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
        yield Case(model, False, 1000, 3, True, rank=64)
        yield Case(model, False, 2048, 2, False, "eager")


def held_out_grid(model: str) -> Iterator[Case]:
    """Other ranks, targets, dropout and shapes than the grid's."""
    longest = HELD_OUT[model]
    few = ("c_attn",) if model == "gpt2-xl" else ("q_proj", "k_proj", "v_proj", "o_proj")
    up = ("c_fc",) if model == "gpt2-xl" else ("gate_proj", "up_proj")
    kind = "eager" if model.startswith("gemma-2") else "sdpa"
    yield Case(model, True, min(1536, longest), 3, True, kind, rank=32, dropout=0.1)
    yield Case(model, False, longest, 1, True, kind, rank=8, dropout=0.0, target_modules=few)
    yield Case(model, True, 768, 2, False, kind, rank=64, dropout=0.0)
    yield Case(model, False, 640, 2, False, "eager", rank=4, dropout=0.05, target_modules=up)
    yield Case(model, True, 1000, 1, False, kind, rank=16, dropout=0.0, target_modules=few, double_quantization=False)


def cases_of(model: str) -> list[Case]:
    """What is simulated of a model, each case once."""
    return list(dict.fromkeys(held_out_grid(model) if model in HELD_OUT else grid(model)))


def read_config(model: str) -> dict[str, Any]:
    """The model's config.json as committed."""
    return dict(json.loads((FOLDER / "configs" / f"{model}.json").read_text())["config"])


def read_golden(model: str) -> list[tuple[Case, Simulated]]:
    """What was simulated."""
    stored = json.loads((FOLDER / "golden" / f"{model}.json").read_text())
    return [
        (Case(**{**c["case"], "target_modules": tuple(c["case"]["target_modules"])}), Simulated(**c["simulated"]))
        for c in stored["cases"]
    ]


def write_golden(model: str) -> None:
    """Simulate the cases of one model."""
    config = read_config(model)
    cases = []
    for case in cases_of(model):
        result = simulate(case, config, EVALUATION_TOKENS if case.checkpointing else 0)
        sys.stdout.write(f"{case.name()} {result.step_peak_bytes / 2**30:.2f} GiB\n")
        sys.stdout.flush()
        cases.append({"case": asdict(case), "simulated": result.to_json_dict()})
    stored = {
        "source": "tests/planner/simulator (FakeTensorMode over the model code)",
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, peft)},
        "evaluation_tokens": EVALUATION_TOKENS,
        "cases": cases,
    }
    path = FOLDER / "golden" / f"{model}.json"
    path.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    for chosen in sys.argv[1:] or (MODELS | HELD_OUT):
        write_golden(chosen)
