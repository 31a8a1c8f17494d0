"""Prepare → train → publish with real stages, a hub, a real S3 server and a tiny real model: what a user gets is what was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.names import Stage
from finetune_api.results import Manifest
from finetune_trainer.prepare.run import run as prepare
from finetune_trainer.publish.run import run as publish
from finetune_trainer.train import evaluate
from finetune_trainer.train.device import Compute
from finetune_trainer.train.run import run as train
from tests.support.hub_server import HubServer
from tests.support.prepared import deep_merge, job_spec, questions
from tests.support.tiny_model import build_tiny_model
from tests.support.trainer_run import Pod

COMPUTE = Compute(torch.device("cpu"), torch.float32, "cpu")


METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"type": "LoRA"},
    "QLoRA": {"type": "QLoRA"},
    "8 bit": {"type": "QLoRA", "quantization": {"type": "Int8"}},
}
PATTERNS = {
    # In a file that is sorted by name the general ones come first.
    "rankPattern": {"down_proj": 2, "layers.1.mlp.down_proj": 5},
    "alphaPattern": {"gate_proj": 2, "layers.1.mlp.gate_proj": 40},
    "loraPlusLRRatio": 2,
}


@pytest.mark.parametrize(
    ("method", "base_weights", "variant"),
    [
        ("LoRA", "Quantized", {}),
        ("QLoRA", "Quantized", {}),
        ("QLoRA", "Original", {}),
        ("LoRA", "Quantized", {"useDora": True}),
        ("QLoRA", "Quantized", {"useDora": True}),
        ("LoRA", "Quantized", {"useRslora": True, "excludeModules": ["gate_proj"], "layersToTransform": [1]}),
        ("LoRA", "Quantized", {"initialization": "EVA", "rankPattern": {"v_proj": 6}}),
        ("QLoRA", "Quantized", {"initialization": "LoftQ"}),
        ("LoRA", "Quantized", {"initialization": "PiSSA", "useRslora": True}),
        ("QLoRA", "Quantized", {"initialization": "OLoRA"}),
        ("8 bit", "Quantized", {"useDora": True}),
        ("QLoRA", "Quantized", {"modulesToSave": ["embed_tokens", "lm_head"], "rank": 4}),
        ("QLoRA", "Quantized", PATTERNS),
    ],
    ids=[
        "LoRA",
        "QLoRA",
        "QLoRA into the original",
        "DoRA",
        "QLoRA with DoRA",
        "rsLoRA of some layers",
        "EVA",
        "LoftQ",
        "PiSSA with rsLoRA",
        "QLoRA with OLoRA",
        "8 bit with DoRA",
        "embeddings and head",
        "ranks and LoRA+",
    ],
)
def test_a_job_ends_in_an_adapter_and_a_merged_model_that_others_can_load(
    s3: Any, hub: HubServer, tmp_path: Path, method: str, base_weights: str, variant: dict[str, Any]
) -> None:
    base = build_tiny_model(tmp_path / "base", shards=2)
    hub.add_model("org/tiny", base)
    bucket = s3.new_bucket()
    s3.put(bucket, "train.jsonl", "".join(json.dumps({"messages": m}) + "\n" for m in questions(48)))
    pod = Pod(tmp_path / "pod")
    for slot in ("output", "train-0"):
        s3.write_secret(pod.secrets / slot)
    spec = deep_merge(
        job_spec(s3, bucket),
        {
            "method": {**METHODS[method], "lora": variant},
            "output": {"merged": {"enabled": True, "dtype": "float32", "base": base_weights}},
            "training": {"length": {"epochs": 4}, "microBatchSequences": 3},
        },
    )
    spec["model"] = {"uri": "hf://org/tiny", "endpointURL": hub.endpoint}

    prepared = prepare(pod.context(spec))
    trained = train(pod.context(spec, Stage.TRAIN))
    published = publish(pod.context(spec, Stage.PUBLISH))

    assert trained.metrics.steps == prepared.total_steps
    assert trained.metrics.perplexity < 0.8 * trained.metrics.perplexity_base
    assert published.metrics == trained.metrics
    assert published.merged_bytes
    context = pod.context(spec, Stage.PUBLISH)
    store = context.output_store()
    manifest = store.get_model("manifest.json", Manifest)
    assert manifest.base_model["commit"] == prepared.model_commit
    assert manifest.data_hash == prepared.data_hash
    assert list(context.workspace_store().list()) == []  # deleted: it held the rows

    got = tmp_path / "got"
    s3.get_dir(bucket, store.location.key, got)
    tokenizer = AutoTokenizer.from_pretrained(got / "adapter")
    config = json.loads((got / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/tiny"
    merged = AutoModelForCausalLM.from_pretrained(got / "merged", dtype="auto")
    answers = json.loads((got / "reports" / "answers.json").read_text())
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": a["prompt"]}], tokenize=True, add_generation_prompt=True, return_dict=True)["input_ids"]
        for a in answers
    ]  # fmt: skip
    said = evaluate.greedy_answers(merged, prompts, tokenizer, COMPUTE, 8)
    if method == "LoRA" or base_weights == "Original":
        tuned = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), got / "adapter"
        )
        assert said == evaluate.greedy_answers(tuned.get_base_model(), prompts, tokenizer, COMPUTE, 8)
    page = (got / "reports" / "index.html").read_text()
    assert "<h2>What is learned</h2>" in page
    assert "&lt;|im_end|&gt;</b>" in page, "the end of a turn, escaped and learned"
    lines = [json.loads(line) for line in (got / "reports" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, trained.metrics.steps + 1))
    assert [line["held_out_loss"] for line in lines if "held_out_loss" in line] == [
        trained.metrics.held_out_loss_base,
        trained.metrics.held_out_loss,
    ]

    # Again, in another pod: the manifest is found, and nothing is done twice.
    assert publish(pod.context(spec, Stage.PUBLISH)) == published
