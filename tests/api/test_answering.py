"""How many answers a run generates."""

from __future__ import annotations

from typing import Any

import pytest

from finetune_api.answering import GATHERED_NEW_TOKENS, GATHERED_PROMPTS, answer_limits, capped
from finetune_api.spec import FineTuneJobSpec


def spec(prompts: int, tokens: int, **training: Any) -> FineTuneJobSpec:
    return FineTuneJobSpec.model_validate(
        {
            "model": {"uri": "hf://org/model"},
            "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
            "output": {"uri": "s3://models/out"},
            "evaluation": {"generation": {"prompts": prompts, "maxNewTokens": tokens}},
            "training": training,
            "compute": {"gpusPerNode": 2},
        }
    )


@pytest.mark.parametrize("training", [{"parallelism": "FSDP"}, {"cpuOffload": "Always"}])
def test_where_each_token_gathers_the_base_few_are_generated_and_the_job_says_so(training: dict[str, Any]) -> None:
    asked = spec(100, 512, **training)
    limits = answer_limits(asked, gathered=True)
    assert (limits.prompts, limits.new_tokens) == (GATHERED_PROMPTS, GATHERED_NEW_TOKENS)
    assert "8 of 100 prompts are answered, with at most 64 of 512 tokens" in capped(asked, None)[0]
    assert capped(spec(3, 64, **training), None) == []
    assert capped(spec(0, 512, **training), None) == []


def test_elsewhere_as_many_as_asked_for() -> None:
    asked = spec(100, 512)
    limits = answer_limits(asked, gathered=False)
    assert (limits.prompts, limits.new_tokens) == (100, 512)
    assert capped(asked, None) == []
