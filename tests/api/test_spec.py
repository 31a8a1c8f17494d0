"""pydantic refuses what the API server's rules refuse: pods and tools that read a spec check it without an API server."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from finetune_api.snapshot import resolve_plan
from finetune_api.spec import FineTuneJobSpec, Full
from tests.api.test_admission import FULL_REFUSED, merged

MINIMAL: dict[str, Any] = {
    "model": {"uri": "hf://a/b"},
    "data": {"train": [{"uri": "s3://bucket/x.jsonl"}]},
    "output": {"uri": "s3://bucket"},
}


EXPERTS: dict[str, Any] = {"dropout": 0, "targetParameters": ["mlp.experts.down_proj"]}


def templated(**parts: str) -> dict[str, Any]:
    """A source whose rows are written by a template."""
    return {"data": {"train": [{"uri": "s3://bucket/x.jsonl", "template": parts}]}}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"method": {"type": "QLoRA", "lora": {"bias": "All"}}}, "QLoRA cannot train biases"),
        ({"method": {"lora": {"targetModules": ["(q|k)_proj"]}}}, "String should match pattern"),
        (
            {"method": {"lora": {"initialization": "OLoRA", "useDora": True}}},
            "useDora and initialization: PiSSA or OLoRA",
        ),
        ({"method": {"lora": EXPERTS | {"dropout": 0.1}}}, "dropout of inputs has no place: set dropout: 0"),
        ({"method": {"lora": EXPERTS | {"useDora": True}}}, "targetParameters has no magnitudes to train"),
        ({"method": {"lora": EXPERTS | {"initialization": "EVA"}}}, "initialization: Default or Gaussian"),
        ({"method": {"lora": EXPERTS | {"layersToTransform": [1]}}}, "layersToTransform does not reach"),
        ({"method": {"type": "Auto", "lora": EXPERTS}}, "lora.targetParameters is for type: LoRA"),
        (
            {"method": {"type": "QLoRA", "quantization": {"type": "Int8", "doubleQuantization": True}}},
            "doubleQuantization is for the constants of the 4-bit types",
        ),
        (
            {"method": {"type": "QLoRA", "quantization": {"type": "Int8"}, "lora": {"initialization": "LoftQ"}}},
            "LoftQ makes good for what 4 bits leave",
        ),
        (
            {"method": {"type": "Auto", "quantization": {"type": "Int8"}}, "training": {"cpuOffload": "IfNeeded"}},
            "Int8 needs the whole base model on each GPU",
        ),
        ({"runtime": {"labels": {"a b": "c"}}}, "'a b': every key must be a name"),
        ({"runtime": {"annotations": {"/x": "c"}}}, "'/x': every key must be a name"),
        ({"runtime": {"nodeSelector": {"a": "b c"}}}, "String should match pattern"),
        ({"training": {"optimizer": {"name": "adamw"}}}, "Input should be 'adamw_torch'"),
        ({"training": {"optimizer": {"name": "lomo"}}}, "within the backward pass"),
        ({"training": {"optimizer": {"name": "schedule_free_sgd"}}}, "set training.scheduler: Constant"),
        ({"evaluation": {"generation": {"metrics": ["Regex"]}}}, "regex and the metric Regex need each other"),
        (
            {"evaluation": {"generation": {"sources": [{"uri": "s3://bucket/p", "weight": 2}]}}},
            "leave weight and format",
        ),
        (
            {"evaluation": {"generation": {"sources": [{"uri": "s3://bucket/p", "format": "Tokenized"}]}}},
            "leave weight and",
        ),
        ({"evaluation": {"judge": {"endpointURL": "https://me:pw@x/v1", "model": "m"}}}, "String should match pattern"),
        (
            {"evaluation": {"generation": {"prompts": 0}, "judge": {"endpointURL": "https://x/v1", "model": "m"}}},
            "a judge compares answers",
        ),
        ({"evaluation": {"generation": {"regex": "x"}}}, "regex and the metric Regex need each other"),
        (templated(prompt="a", text="b"), "exactly one of text, prompt, user must be set"),
        (templated(text="a", completion="b"), "completion belongs to prompt, assistant to user"),
        (templated(user="a", completion="b"), "completion belongs to prompt, assistant to user"),
        (templated(text="a", system="b"), "system to either of them"),
        (templated(prompt="a"), "set template.completion beside prompt"),
        (
            {"data": {**templated(text="a")["data"], "heldOut": {"sources": templated(user="a")["data"]["train"]}}},
            "beside user",
        ),
        (
            {"data": {"train": [{"uri": "s3://bucket/x", "template": {"text": "a"}, "columns": {"text": "b"}}]}},
            "leave columns out",
        ),
        (
            {"data": {"train": [{"uri": "s3://bucket/x", "template": {"text": "a"}, "format": "Messages"}]}},
            "leave format out",
        ),
        ({"evaluation": {"tasks": [{"name": "a"}, {"name": "a", "limit": 5}]}}, "a stands twice"),
        ({"evaluation": {"tasks": [{"name": "a", "uri": "s3://bucket/no-folder"}]}}, "String should match pattern"),
        ({"trackers": [{"type": "WeightsAndBiases"}]}, "WeightsAndBiases needs secretRef"),
        ({"trackers": [{"type": "MLflow"}]}, "MLflow needs endpointURL, or secretRef"),
        ({"trackers": [{"type": "Trackio", "endpointURL": "https://a.b"}]}, "Trackio needs secretRef"),
        ({"trackers": [{"type": "TensorBoard", "project": "x"}]}, "TensorBoard's event files lie beside"),
        ({"trackers": [{"type": "TensorBoard"}, {"type": "TensorBoard"}]}, "TensorBoard stands twice"),
        ({"trackers": [{"type": "MLflow", "endpointURL": "https://me:key@a.b"}]}, "String should match pattern"),
    ],
)
def test_refuses(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        FineTuneJobSpec.model_validate({**MINIMAL, **fields})


@pytest.mark.parametrize(("case", "patch", "words"), FULL_REFUSED, ids=[c[0] for c in FULL_REFUSED])
def test_full_weights_are_refused_offline_in_the_api_servers_words(
    case: str, patch: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        FineTuneJobSpec.model_validate(merged(MINIMAL, patch))


def test_full_weights_have_a_learning_rate_of_their_own() -> None:
    full = resolve_plan(FineTuneJobSpec.model_validate(merged(MINIMAL, {"method": {"type": "Full"}})))
    assert (full.learning_rate, full.method.full, full.galore) == (2e-5, Full(), None)
    lora = resolve_plan(FineTuneJobSpec.model_validate(MINIMAL))
    assert (lora.learning_rate, lora.method.full) == (2e-4, None)
    assert "full" not in lora.to_json_dict()["method"], "a LoRA job's snapshot has the bytes that it had"  # type: ignore[operator]


@pytest.mark.parametrize(
    "lora",
    [
        {"useDora": True},
        {"modulesToSave": ["norm"]},
        {"initialization": "PiSSA"},
        {"initialization": "EVA"},
        {"dropout": 0, "targetParameters": ["mlp.experts.down_proj"]},
    ],
)
@pytest.mark.parametrize("training", [{"parallelism": "FSDP"}, {"cpuOffload": "IfNeeded"}])
def test_what_needs_the_whole_base_is_refused_with_shards_offline_too(
    lora: dict[str, Any], training: dict[str, Any]
) -> None:
    with pytest.raises(ValidationError, match="whole base model on each GPU"):
        FineTuneJobSpec.model_validate(
            {**MINIMAL, "method": {"lora": lora}, "training": training, "compute": {"gpusPerNode": 2}}
        )
