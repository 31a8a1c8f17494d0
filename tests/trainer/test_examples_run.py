"""Every example runs to its result: as the file says, but for where things come from, how long it takes, and the device."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_api.names import JUDGE_SLOT, Stage, held_out_slot, prompts_slot, tracker_slot, train_slot
from finetune_api.results import MANIFEST, Manifest
from finetune_trainer.prepare.run import run as prepare
from finetune_trainer.publish.run import run as publish
from finetune_trainer.train.run import run as train
from tests.support.judge_server import JudgeServer
from tests.support.prepared import questions
from tests.support.tracker_servers import MlflowServer, WandbServer
from tests.support.trainer_run import Pod

Spec = dict[str, Any]
EXAMPLES = {
    path.stem: spec
    for path in sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
    if (spec := yaml.safe_load(path.read_text()))["kind"] == "FineTuneJob"
}
SEVERAL_GPUS = ("parallelism", "cpuOffload")
"""What needs GPUs, or several processes, is tested by other means (test_train_sharded)."""
TRACKER_KEYS = {"WeightsAndBiases": {"WANDB_API_KEY": WandbServer.key}, "MLflow": {"MLFLOW_TRACKING_TOKEN": "token"}}


@pytest.fixture(scope="module")
def servers() -> Iterator[dict[str, Any]]:
    with ExitStack() as running:
        yield {
            "judge": running.enter_context(JudgeServer(lambda _a, _b: "[[A]]")),
            "MLflow": running.enter_context(MlflowServer()),
            "WeightsAndBiases": running.enter_context(WandbServer()),
        }


@pytest.fixture(scope="module")
def bucket(s3: Any, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A base model, an adapter on it, and rows."""
    name = str(s3.new_bucket())
    s3.put_dir(name, "base", tiny_model)
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapter = tmp_path_factory.mktemp("adapter")
    get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).save_pretrained(adapter)
    s3.put_dir(name, "adapter", adapter)
    columns = [
        {"context": f"It is {n}.", "question": f"Which is it, {n}?", "answers": {"text": [str(n)]}} for n in range(40)
    ]
    s3.put(name, "columns.jsonl", "".join(json.dumps(row) + "\n" for row in columns))
    for file, rows in (("train.jsonl", questions(40)), ("other.jsonl", questions(8, seed=100))):
        s3.put(name, file, "".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return name


def here(example: Spec, s3: Any, bucket: str, servers: dict[str, Any], pod: Pod) -> Spec:
    """The example's spec on this machine."""
    spec: Spec = json.loads(json.dumps(example))

    def stored(source: Spec, key: str, slot: str) -> None:
        source.pop("revision", None)
        key = "columns.jsonl" if "template" in source else key
        source |= {"uri": f"s3://{bucket}/{key}", "endpointURL": s3.endpoint, "secretRef": {"name": "s3"}}
        s3.write_secret(pod.secrets / slot)

    stored(spec["model"], "base", "model")
    spec["model"].pop("cache", None)
    if "initialAdapter" in spec["model"]:
        stored(spec["model"]["initialAdapter"], "adapter", "initial-adapter")
    for index, source in enumerate(spec["data"]["train"]):
        stored(source, "train.jsonl" if index == 0 else "other.jsonl", train_slot(index))
    for index, source in enumerate(spec["data"].get("heldOut", {}).get("sources", [])):
        stored(source, "other.jsonl", held_out_slot(index))
    evaluation = spec.setdefault("evaluation", {})
    evaluation.pop("tasks", None)  # they come from the Hub, as in test_tasks_hub, which does those of the example
    generation = evaluation.setdefault("generation", {})
    for index, source in enumerate(generation.get("sources", [])):
        stored(source, "other.jsonl", prompts_slot(index))
    generation["maxNewTokens"] = 4
    if "intervalSteps" in evaluation:
        evaluation["intervalSteps"] = 1
    stored(spec["output"], "out", "output")
    training = {k: v for k, v in spec.get("training", {}).items() if k not in SEVERAL_GPUS}
    spec["training"] = {**training, "useCpu": True, "length": {"steps": 2}}
    spec["compute"] = {"gpusPerNode": 0}
    if judge := evaluation.get("judge"):
        judge["endpointURL"] = servers["judge"].url
        secret(pod, JUDGE_SLOT, {"OPENAI_API_KEY": "key"})
    for tracker in spec.get("trackers", []):
        if server := servers.get(tracker["type"]):
            tracker["endpointURL"] = server.url
            secret(pod, tracker_slot(tracker["type"]), TRACKER_KEYS[tracker["type"]])
    return spec


def secret(pod: Pod, slot: str, keys: dict[str, str]) -> None:
    (pod.secrets / slot).mkdir(parents=True)
    for name, value in keys.items():
        (pod.secrets / slot / name).write_text(value)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(name: str, s3: Any, bucket: str, servers: dict[str, Any], tmp_path: Path) -> None:
    pod = Pod(tmp_path)
    spec = here(EXAMPLES[name]["spec"], s3, bucket, servers, pod)
    prepared = prepare(pod.context(spec, name=name))
    if spec.get("planOnly"):
        assert prepared.data.train_rows, "it was checked, and a plan-only job ends there"
        return
    trained = train(pod.context(spec, Stage.TRAIN, name=name))
    published = publish(pod.context(spec, Stage.PUBLISH, name=name))
    assert trained.metrics.steps == 2
    manifest = pod.context(spec, Stage.PUBLISH, name=name).output_store().get_model(MANIFEST, Manifest)
    full = spec.get("method", {}).get("type") == "Full"
    assert (bool(published.adapter_bytes), bool(published.model_bytes)) == (not full, full)
    assert bool(published.merged_bytes) == spec["output"].get("merged", {}).get("enabled", False)
    assert (published.judge is not None) == ("judge" in spec["evaluation"])
    assert [t.problem for t in manifest.tracked] == [None] * len(spec.get("trackers", []))
