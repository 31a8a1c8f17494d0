"""Who answers tasks: each model with its own tokenizer, and several ranks as one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.names import Stage
from finetune_api.results import TASK_REPLIES, TaskAnswers
from finetune_trainer.prepare.run import run as prepare
from finetune_trainer.train import run as training
from tests.support.prepared import PreparedJob, deep_merge
from tests.support.train_process import kill_all
from tests.support.train_process import pod_of as processes_of
from tests.trainer.conftest import S3
from tests.trainer.test_tasks import CHOICE, DOCUMENTS, SAYING, measured_by_lm_eval, pod_of, spec_of, task
from tests.trainer.test_train_ranks import ROUNDING

pytestmark = pytest.mark.timeout(1200)
CALL = "<call>"
CALLED = [
    {**d, "question": f"{CALL} {d['question']}", "choices": [f"{CALL}{choice}" for choice in d["choices"]]}
    for d in DOCUMENTS
]


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    kill_all()


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def new_bucket(s3: S3, model: Path, documents: list[dict[str, Any]]) -> str:
    """A model, rows to learn and a folder with two tasks."""
    name = s3.new_bucket()
    s3.put_dir(name, "base", model)
    turns = [
        [{"role": "user", "content": d["question"]}, {"role": "assistant", "content": d["choices"][0]}]
        for d in documents
    ]
    s3.put(name, "train.jsonl", lines([{"messages": m} for m in turns]))
    s3.put(name, "tasks/choice.yaml", CHOICE)
    s3.put(name, "tasks/saying.yaml", SAYING)
    s3.put(name, "tasks/data/test.jsonl", lines(documents))
    return name


def replies(job: PreparedJob) -> TaskAnswers:
    return job.context().workspace_store().get_model(TASK_REPLIES, TaskAnswers)


def test_each_model_is_asked_in_its_own_tokens(
    s3: S3, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The base as it was before a token was added, the tuned one with it: both as lm-eval would by itself."""
    monkeypatch.syspath_prepend(os.environ["FINETUNE_LM_EVAL"])
    bucket = new_bucket(s3, tiny_model, CALLED)
    pod = pod_of(s3, tmp_path)
    spec = spec_of(s3, bucket, task(bucket, "choice", limit=6), task(bucket, "saying", limit=6))
    spec = deep_merge(
        spec,
        {
            "model": {"newTokens": [CALL]},
            "method": {"lora": {"trainableTokens": ["<|im_start|>"]}},
            "training": {"computeDtype": "float32"},
        },
    )
    prepare(pod.context(spec))
    training.run(pod.context(spec, Stage.TRAIN))
    context = pod.context(spec, Stage.PUBLISH)
    found = context.workspace_store().get_model(TASK_REPLIES, TaskAnswers)

    s3.get_dir(bucket, context.output_store().location.key, tmp_path / "got")
    s3.get_dir(bucket, "tasks", tmp_path / "own")
    asked = (("choice", None, 6), ("saying", None, 6))
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    before, after = (AutoTokenizer.from_pretrained(f) for f in (tiny_model, tmp_path / "got" / "adapter"))
    assert len(before(CALL, add_special_tokens=False)["input_ids"]) > 1
    assert len(after(CALL, add_special_tokens=False)["input_ids"]) == 1
    expected = measured_by_lm_eval(base, before, tmp_path / "own", asked)
    base.resize_token_embeddings(len(after), mean_resizing=False)
    tuned = PeftModel.from_pretrained(base, tmp_path / "got" / "adapter")
    expected_tuned = measured_by_lm_eval(tuned, after, tmp_path / "own", asked)
    for side, measured in ((found.base, expected), (found.tuned, expected_tuned)):
        assert side.log_likelihoods == pytest.approx([a[0] for a in measured["choice"]["answers"]], abs=1e-3)
        assert side.greedy == [a[1] for a in measured["choice"]["answers"]]
        assert side.texts == measured["saying"]["answers"]
    assert found.base.log_likelihoods != pytest.approx(found.tuned.log_likelihoods, abs=0.1), "training shows"


def test_two_ranks_answer_as_one_process_does(s3: S3, tiny_model: Path, tmp_path: Path) -> None:
    """With whole copies the first one answers everything, in shards both do what needs no generation."""
    bucket = new_bucket(s3, tiny_model, DOCUMENTS)
    answered = {}
    for how, changes in {
        "alone": {},
        "copies": {"compute": {"gpusPerNode": 2}, "training": {"parallelism": "DDP"}},
        "shards": {"compute": {"gpusPerNode": 2}, "training": {"parallelism": "FSDP"}},
    }.items():
        pod = pod_of(s3, tmp_path / how)
        spec = spec_of(s3, bucket, task(bucket, "choice", limit=6), task(bucket, "saying", limit=4))
        spec = deep_merge(deep_merge(spec, changes), {"output": {"uri": f"s3://{bucket}/{how}"}})
        report = prepare(pod.context(spec))
        assert any("saying left out" in warning for warning in report.warnings) == (how == "shards")
        job = PreparedJob(pod.context(spec).snapshot, bucket, pod.root)
        process = processes_of(job).start()
        assert process.wait() == 0, process.log
        answered[how] = replies(job)
    alone, copies, shards = answered.values()
    for side in ("base", "tuned"):
        one, two, parts = (getattr(each, side) for each in (alone, copies, shards))
        assert len(one.log_likelihoods) == 18
        assert two.log_likelihoods == pytest.approx(one.log_likelihoods, rel=ROUNDING)
        assert parts.log_likelihoods == pytest.approx(one.log_likelihoods, rel=ROUNDING)
        assert (len(one.texts), two.texts, parts.texts) == (4, one.texts, [])
    assert alone.base.log_likelihoods != alone.tuned.log_likelihoods
