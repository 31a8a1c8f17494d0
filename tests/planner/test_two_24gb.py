"""A 70B on two GPUs with 24 GB at rank 16, one row of 1,024 tokens at a time: on which it fits, and what does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.planner import MemoryPlan, describe, find_gpu, parse_config, plan, request_of
from finetune_api.planner.distributed import Layout
from finetune_api.planner.fit import limit, quantized
from finetune_api.spec import FineTuneJobSpec

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
EXAMPLE = yaml.safe_load((ROOT / "examples" / "70b-2x24gb.yaml").read_text())["spec"]
GOLDEN: list[dict[str, Any]] = json.loads((HERE / "two_24gb.json").read_text())
GPUS = ("NVIDIA-GeForce-RTX-3090", "NVIDIA-GeForce-RTX-4090", "NVIDIA-A30", "NVIDIA-A10G", "NVIDIA-L4")
ALL_LINEAR = "all-linear"


def planned(row: dict[str, Any]) -> MemoryPlan:
    targets = [ALL_LINEAR] if row["targets"] == ALL_LINEAR else row["targets"].split(", ")
    spec = FineTuneJobSpec.model_validate(
        {
            **EXAMPLE,
            "method": {"type": "QLoRA", "lora": {"rank": 16, "targetModules": targets}},
            "training": {**EXAMPLE["training"], "optimizer": {"name": row["optimizer"]}},
        }
    )
    assert (spec.training.micro_batch_sequences, spec.training.max_sequence_tokens) == (1, 1024)
    arch = parse_config(json.loads((HERE / "configs" / f"{row['model']}.json").read_text())["config"])
    asked = request_of(spec, arch, describe(arch), gpus=2)
    # Evaluation batches are as small as they must be: of one row, and one prompt at a time.
    small = {"evaluation_tokens": 1024, "generation_prompts": 1}
    return plan(quantized(asked).model_copy(update={"layout": Layout.FSDP, **small}))


@pytest.mark.parametrize("row", GOLDEN, ids=lambda row: "-".join((row["model"], row["targets"], row["optimizer"])))
def test_what_fits_on_two_gpus_with_24_gb_is_what_is_told(row: dict[str, Any]) -> None:
    found = planned(row)
    assert round(found.needed_bytes / 2**30, 1) == row["needsGiB"]
    assert [gpu for gpu in GPUS if found.needed_bytes <= limit(find_gpu(gpu).usable_bytes)] == row["fits"]
    told = f"| {row['model']} | {row['targets']} | `{row['optimizer']}` | {row['needsGiB']} |"
    assert told in (ROOT / "docs" / "planner.md").read_text()


def test_the_example_is_one_of_them() -> None:
    targets, optimizer = ", ".join(EXAMPLE["method"]["lora"]["targetModules"]), "adamw_torch_fused"
    (row,) = (r for r in GOLDEN if (r["model"], r["targets"], r["optimizer"]) == ("llama-2-70b", targets, optimizer))
    assert EXAMPLE["compute"]["gpu"]["product"] in row["fits"]
    assert FineTuneJobSpec.model_validate(EXAMPLE).training.optimizer.name == optimizer
