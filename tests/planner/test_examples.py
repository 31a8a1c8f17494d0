"""The examples of a 70B: what is planned for them, by the model's shapes and the longest rows that they allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_api.planner import choose, describe, find_gpu, host_memory_misfit, parse_config, request_of, rounds
from finetune_api.snapshot import rank_count
from finetune_api.spec import FineTuneJobSpec

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").glob("70b-*.yaml"))
CONFIGS = {
    "hf://meta-llama/Llama-2-70b-chat-hf": "llama-2-70b.json",
    "hf://meta-llama/Llama-3.3-70B-Instruct": "llama-3-70b.json",
}
PLANS: dict[str, Any] = json.loads((Path(__file__).parent / "examples.json").read_text())


def planned(path: Path) -> dict[str, Any]:
    spec = FineTuneJobSpec.model_validate(yaml.safe_load(path.read_text())["spec"])
    config = json.loads((Path(__file__).parent / "configs" / CONFIGS[spec.model.uri]).read_text())["config"]
    arch = parse_config(config)
    gpu = find_gpu(spec.compute.gpu.product or "")
    tries = [
        choose(
            request_of(spec, arch, describe(arch), gpus=rank_count(spec)),
            gpu.usable_bytes,
            spec.training.global_batch_sequences,
            spec.method.type,
            evaluation_follows=True,
            several=several,
        )
        for several in rounds(spec)
    ]
    choice = next(choice for choice in tries if choice.fit.fits)
    assert not host_memory_misfit(spec, choice)
    return {
        "fits": choice.fit.fits,
        "layout": choice.request.layout,
        "microBatchSequences": choice.micro_batch_sequences,
        "needsGiB": round(choice.planned.needed_bytes / 2**30, 1),
        "usableGiB": round(gpu.usable_bytes / 2**30, 1),
        **({"hostGiB": round(choice.planned.host_memory_bytes / 2**30, 1)} if choice.planned.offloaded_bytes else {}),
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_the_plan_that_it_tells_of(path: Path) -> None:
    plan = planned(path)
    assert plan == PLANS[path.stem]
    assert plan["fits"]
    assert f"{plan['needsGiB']} of {plan['usableGiB']} GiB" in path.read_text()
    assert "hostGiB" not in plan or f"{plan['hostGiB']} GiB of host memory" in path.read_text()


def test_every_plan_is_of_an_example() -> None:
    assert set(PLANS) == {path.stem for path in EXAMPLES}
