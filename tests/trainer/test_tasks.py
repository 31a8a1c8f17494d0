"""Tasks of lm-eval: what is measured is what lm-eval itself measures with the same models, and nothing but forward passes needs a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune_api.answering import positions_of
from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.results import (
    BASE_EVALUATION,
    PREPARE_RESULT,
    TASK_REPLIES,
    BaseEvaluation,
    Manifest,
    PrepareResult,
    Scores,
    TaskPrompt,
)
from finetune_api.spec import Training
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.run import run as prepare
from finetune_trainer.prepare.task_rows import cut_prompts, write_rows
from finetune_trainer.prepare.tasks import generated_tokens, prepare_tasks
from finetune_trainer.publish.run import run as publish
from finetune_trainer.publish.tasks import task_scores
from finetune_trainer.tasks.protocol import ASKED, Asked, AskedTask, Continuation, Generated, Requests, generated_of
from finetune_trainer.train import evaluate
from finetune_trainer.train import run as training
from finetune_trainer.train.device import pick_compute
from finetune_trainer.train.tasks import cut
from tests.support.prepared import deep_merge, job_spec, questions
from tests.support.trainer_run import Pod
from tests.trainer.conftest import S3

CHOICE = """
task: choice
dataset_path: json
dataset_kwargs: {data_files: {test: data/test.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
SAYING = """
task: saying
dataset_path: json
dataset_kwargs: {data_files: {test: data/test.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[label]}}"
generation_kwargs: {until: ["k"], max_gen_toks: 8}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}, {metric: chrf}]
"""
AGAIN = CHOICE.replace("task: choice", "task: again")
BOTH = "group: both\ntask: [choice, again]\naggregate_metric_list: [{metric: acc, weight_by_size: true}]\n"
ROLLING = SAYING.replace("saying", "rolling").replace("generate_until", "loglikelihood_rolling")
SAMPLED = SAYING.replace("task: saying", "task: sampled").replace("8}", "8, do_sample: true, temperature: 0.7}")
SPOILT = SAYING.replace("task: saying", "task: spoilt").replace(
    "higher_is_better: true}", "higher_is_better: true, regexes_to_ignore: ['(']}"
)
METRIC = SAYING.replace("task: saying", "task: metric").replace("metric: chrf", "metric: rouge")
UNSAFE = SAYING.replace("task: saying", "task: unsafe") + "unsafe_code: true\n"
LONG = SAYING.replace("task: saying", "task: long").replace("max_gen_toks: 8", "max_gen_toks: 200000")
CODE = "task: code\nclass: !function own.Task\n"
DOCUMENTS = [
    {"question": turns[0]["content"], "choices": [turns[1]["content"], "The pod waits.", "No."], "label": 0}
    for turns in questions(12)
]


@pytest.fixture(scope="module")
def bucket(s3: S3, tiny_model: Path) -> str:
    """A model, rows and a folder of tasks."""
    name = s3.new_bucket()
    s3.put_dir(name, "base", tiny_model)
    s3.put(name, "train.jsonl", "".join(json.dumps({"messages": m}) + "\n" for m in questions(48)))
    for kind, text in {"choice": CHOICE, "again": AGAIN, "both": BOTH, "saying": SAYING}.items():
        s3.put(name, f"tasks/{kind}.yaml", text)
    for kind, text in {
        "rolling": ROLLING,
        "sampled": SAMPLED,
        "code": CODE,
        "spoilt": SPOILT,
        "metric": METRIC,
        "unsafe": UNSAFE,
        "long": LONG,
    }.items():
        s3.put(name, f"bad/{kind}.yaml", text)
    for folder in ("tasks", "bad"):
        s3.put(name, f"{folder}/data/test.jsonl", "".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    return name


def task(bucket: str, name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "uri": f"s3://{bucket}/tasks/", "secretRef": {"name": "s3"}, **fields}


def spec_of(s3: S3, bucket: str, *tasks: dict[str, Any]) -> dict[str, Any]:
    return deep_merge(
        job_spec(s3, bucket), {"training": {"length": {"steps": 6}}, "evaluation": {"tasks": list(tasks)}}
    )


def pod_of(s3: S3, folder: Path) -> Pod:
    pod = Pod(folder / "pod")
    for slot in ("model", "output", "train-0", "task-0", "task-1", "task-2"):
        s3.write_secret(pod.secrets / slot)
    return pod


DONE = (("choice", 2, 10), ("saying", None, 10), ("both", None, 4))


def measured_by_lm_eval(
    model: Any, tokenizer: Any, folder: Path, asked: Sequence[tuple[str, int | None, int]] = DONE
) -> dict[str, dict[str, Any]]:
    """lm-eval's own evaluation, with its own implementation of the model: numbers, and what was answered."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    before = Path.cwd()
    os.environ["DISABLE_MULTIPROC"] = "1"  # as the product's own runs
    os.chdir(folder)
    try:
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=128)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        found = {}
        for name, few_shot, limit in asked:
            out = simple_evaluate(
                lm, tasks=[name], num_fewshot=few_shot, limit=limit, task_manager=manager, bootstrap_iters=1000
            )
            assert out is not None
            found[name] = {**out["results"], **out.get("groups", {})}[name]
            if name in out["samples"]:
                found[name]["answers"] = [each[0] for sample in out["samples"][name] for each in sample["resps"]]
        return found
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def done(s3: S3, bucket: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Pod, dict[str, Any], Any]:
    """A job with two tasks, published."""
    pod = pod_of(s3, tmp_path_factory.mktemp("tasks"))
    spec = spec_of(
        s3,
        bucket,
        task(bucket, "choice", limit=10, fewShot=2),
        task(bucket, "saying", limit=10),
        task(bucket, "both", limit=4),
    )
    spec["output"]["workspace"] = {"retention": "Keep"}
    prepare(pod.context(spec))
    s3.client.delete_object(Bucket=bucket, Key="tasks/data/test.jsonl")  # nobody fetches it again
    training.run(pod.context(spec, Stage.TRAIN))
    report = publish(pod.context(spec, Stage.PUBLISH))
    s3.put(bucket, "tasks/data/test.jsonl", "".join(json.dumps(d) + "\n" for d in DOCUMENTS))
    return pod, spec, report


def test_base_and_tuned_score_what_lm_eval_itself_measures(
    done: tuple[Pod, dict[str, Any], Any], s3: S3, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(os.environ["FINETUNE_LM_EVAL"])
    pod, spec, _ = done
    store = pod.context(spec, Stage.PUBLISH).output_store()
    bucket = store.location.bucket
    s3.get_dir(bucket, store.location.key, tmp_path / "got")
    s3.get_dir(bucket, "tasks", tmp_path / "own")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=pick_compute(Training(use_cpu=True)).dtype)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "got" / "adapter")
    expected_base = measured_by_lm_eval(base, tokenizer, tmp_path / "own")
    tuned = PeftModel.from_pretrained(base, tmp_path / "got" / "adapter").get_base_model()
    expected_tuned = measured_by_lm_eval(tuned, tokenizer, tmp_path / "own")
    scores = store.get_model("reports/metrics.json", Scores).tasks
    asked = [s for s in scores if s.part_of is None]
    assert [(s.task, s.metric, s.documents, s.few_shot) for s in asked] == [
        ("choice", "acc", 10, 2), ("choice", "acc_norm", 10, 2), ("saying", "exact_match", 10, 0), ("saying", "chrf", 10, 0),
        ("both", "acc", 0, 0),
    ]  # fmt: skip
    parts = [s for s in scores if s.part_of is not None]
    assert [(s.task, s.metric, s.documents) for s in parts if s.part_of == "both"] == [
        (name, metric, 4) for name in ("choice", "again") for metric in ("acc", "acc_norm")
    ]
    for score in asked:
        for value, error, found in (
            (score.base, score.base_stderr, expected_base),
            (score.tuned, score.tuned_stderr, expected_tuned),
        ):
            assert value == pytest.approx(found[score.task][f"{score.metric},{score.filter}"], abs=1e-6)
            if score.metric != "chrf":
                assert error == pytest.approx(found[score.task][f"{score.metric}_stderr,{score.filter}"], abs=1e-6)
    assert any(s.base != s.tuned for s in scores), "training shows"


def test_scores_stand_in_all_places_and_the_base_is_asked_once(done: tuple[Pod, dict[str, Any], Any]) -> None:
    pod, spec, report = done
    context = pod.context(spec, Stage.PUBLISH)
    store, workspace = context.output_store(), context.workspace_store()
    scores = store.get_model("reports/metrics.json", Scores).tasks
    assert store.get_model("manifest.json", Manifest).tasks == scores
    assert report.tasks == [scores[0], scores[2], scores[4]], "the first number of each"
    page, card = store.get_bytes("reports/index.html").decode(), store.get_bytes("adapter/README.md").decode()
    shown = f"{scores[0].base:.4f} ± {scores[0].base_stderr:.4f}"
    assert f"<tr><td>choice (2 examples, 10 documents)</td><td>acc</td><td>{shown}</td>" in page
    assert f"| choice (2 examples, 10 documents) | acc | {shown} |" in card
    base = workspace.get_model(BASE_EVALUATION, BaseEvaluation)
    assert base.tasks is not None
    # Of the group the two tasks ask the same, without the examples.
    assert (len(base.tasks.log_likelihoods), len(base.tasks.texts)) == (30 + 12, 10)


def test_a_task_is_loaded_once_for_both_models(
    done: tuple[Pod, dict[str, Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is drawn, such as examples, is drawn the same for both: an answer that was not asked for would be missing."""
    monkeypatch.syspath_prepend(os.environ["FINETUNE_LM_EVAL"])
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    from finetune_trainer.tasks import harness

    pod, spec, _ = done
    loaded: list[str] = []

    def load(asked: AskedTask, folder: Path) -> Any:
        loaded.append(asked.name)
        return loading(asked, folder)

    loading = harness.load
    monkeypatch.setattr(harness, "load", load)
    folder = pod.work / "tasks"
    monkeypatch.chdir(folder)
    pairs = harness.both_scores(Asked.model_validate_json((folder / ASKED).read_bytes()), folder)
    assert loaded == ["choice", "saying", "both"]
    scores = pod.context(spec, Stage.PUBLISH).output_store().get_model("reports/metrics.json", Scores).tasks
    assert [(base.value, tuned.value) for base, tuned in pairs] == [(s.base, s.tuned) for s in scores]


def test_answers_that_are_gone_are_made_again_and_told_of(done: tuple[Pod, dict[str, Any], Any]) -> None:
    pod, spec, _ = done
    context = pod.context(spec, Stage.PUBLISH)
    output, workspace = context.output_store(), context.workspace_store()
    trained = training.finished_result(context, output, workspace)
    assert trained is not None
    kept = workspace.get_bytes(TASK_REPLIES)
    workspace.delete(TASK_REPLIES)
    try:
        assert training.finished_result(context, output, workspace) is None
        with pytest.raises(StageError, match=r"tasks\.json has disappeared since training") as info:
            task_scores(context, workspace.get_model(PREPARE_RESULT, PrepareResult), trained, workspace)
        assert info.value.reason is Reason.VERIFICATION_FAILED
    finally:
        workspace.put_bytes(TASK_REPLIES, kept)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rolling", "rolling: rolling asks for loglikelihood_rolling, and only loglikelihood and generate_until are answered"),
        ("sampled", "sampled: ValueError: it samples its answers, and here they are greedy"),
        ("nothing", "nothing: its folder has "),
        ("code", "code: it needs the Python package own, which the trainer image has not: leave it out"),
        ("spoilt", "spoilt: what is answered cannot be scored: error: missing ), unterminated subpattern"),
        ("metric", "metric: its metric rouge is code that the evaluate library downloads, which is not run: leave it out"),
        ("unsafe", "unsafe: unsafe: it runs code that models write, which is not done here: leave it out"),
        ("long", "12 answers with up to 2,400,000 tokens in all are generated by each model, and 1,048,576 tokens is the most: lower limit"),
    ],
)  # fmt: skip
def test_a_task_that_cannot_be_done_fails_before_a_gpu(
    s3: S3, bucket: str, tiny_model: Path, tmp_path: Path, name: str, said: str
) -> None:
    pod = pod_of(s3, tmp_path)
    bad = {**task(bucket, name), "uri": f"s3://{bucket}/bad/"}
    with pytest.raises(StageError) as info:
        prepare_tasks(
            pod.context(spec_of(s3, bucket, bad)), AutoTokenizer.from_pretrained(tiny_model), None, {}, gathered=False
        )
    assert info.value.reason is Reason.INVALID_CONFIG
    assert f"evaluation.tasks: {said}" in info.value.message


@pytest.mark.parametrize(
    ("key", "reason", "said"),
    [("empty/x.txt", Reason.DATASET_NOT_FOUND, "there is no .yaml file"), ("hub/choice.yaml", Reason.HUB_UNAVAILABLE, "org/none")],
)  # fmt: skip
def test_data_that_are_not_there_are_told_of_or_waited_for_before_a_gpu(
    s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, reason: Reason, said: str
) -> None:
    """A cluster without a way to the Hub waits, as for a model there."""
    waits: list[StageError] = []

    def wait(ctx: Any, fn: Any, **_: Any) -> Any:
        try:
            return fn()
        except StageError as error:
            waits.append(error)
            raise

    monkeypatch.setattr("finetune_trainer.prepare.tasks.wait_until_available", wait)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    s3.put(bucket, key, CHOICE.replace("path: json", "path: org/none"))
    folder = f"s3://{bucket}/{key.partition('/')[0]}/"
    with pytest.raises(StageError) as info:
        prepare_tasks(
            pod_of(s3, tmp_path).context(spec_of(s3, bucket, {**task(bucket, "choice"), "uri": folder})),
            None,
            None,
            {},
            gathered=False,
        )
    assert (info.value.reason, len(waits)) == (reason, 1)
    assert said in info.value.message


def test_an_image_without_lm_eval_is_told(s3: S3, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINETUNE_LM_EVAL", str(tmp_path))
    with pytest.raises(StageError, match="use the trainer image of this version") as info:
        prepare_tasks(
            pod_of(s3, tmp_path).context(spec_of(s3, bucket, task(bucket, "choice"))), None, None, {}, gathered=False
        )
    assert info.value.reason is Reason.INVALID_CONFIG


def test_tasks_that_generate_are_left_out_where_each_token_gathers_the_base(
    s3: S3, bucket: str, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    both = spec_of(s3, bucket, task(bucket, "saying", limit=2), task(bucket, "choice", limit=2))
    found = prepare_tasks(pod_of(s3, tmp_path).context(both), tokenizer, None, {}, gathered=True)
    assert [
        "saying left out: they have answers generated, and no GPU holds the whole base" in w for w in found.warnings
    ] == [True]
    rows = pq.read_table(found.files["prepare/task-rows.parquet"])
    assert (len(rows), found.files["prepare/task-prompts.json"].read_text()) == (6, "[]"), "likelihoods cost a pass"
    alone = spec_of(s3, bucket, task(bucket, "saying", limit=2))
    found = prepare_tasks(pod_of(s3, tmp_path / "alone").context(alone), tokenizer, None, {}, gathered=True)
    assert (found.files, len(found.warnings)) == ({}, 1)


def test_a_job_is_told_of_answers_that_take_long() -> None:
    asked = [Generated(context=str(i), until=(), max_new_tokens=1280) for i in range(100)]
    assert generated_tokens(asked[:50]) == []
    assert generated_tokens(asked) == [
        "evaluation.tasks: 100 answers with up to 128,000 tokens in all are generated by each model, while a GPU is held; limit makes it fewer"
    ]


def test_an_answer_ends_with_what_a_task_names(tiny_model: Path) -> None:
    """It is cut to the same text, whatever else is answered at once; and when all have said it, nothing more is generated."""
    compute = pick_compute(Training(use_cpu=True))
    causal_lm = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=compute.dtype)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    prompts = [tokenizer(turns[0]["content"])["input_ids"] for turns in questions(3)]

    def answers(asked: list[list[int]], until: list[str]) -> list[str]:
        found = evaluate.greedy_tokens(causal_lm, asked, tokenizer, compute, 48, until=until)
        return [str(tokenizer.decode(tokens)) for tokens in found]

    whole = answers(prompts, [])
    stop = whole[0][2:4]
    assert [cut(text, [stop]) for text in answers(prompts, [stop, "never said"])] == [cut(t, [stop]) for t in whole]
    (alone,) = answers(prompts[:1], [stop])
    assert alone.endswith(stop)
    assert len(alone) < len(whole[0])


def test_prompts_are_counted_that_positions_leave_no_room_for() -> None:
    prompts = [TaskPrompt(input_ids=[1] * n, max_new_tokens=100, until=[]) for n in (10, 30, 60)]
    config = {"n_positions": 150}
    assert [
        cut_prompts(prompts, positions, limit) for positions, limit in ((None, 40), (positions_of(config), 512))
    ] == [1, 1]
    assert cut_prompts(prompts[:1], 110, 512) == 0, "it fits as it is"
    with pytest.raises(
        StageError, match="a prompt of 30 tokens is to be answered with up to 100, and the model has 110 pos"
    ) as info:
        cut_prompts(prompts, 110, 512)
    assert info.value.reason is Reason.INVALID_CONFIG


def test_a_continuation_is_cut_on_the_left_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    requests = Requests(
        continuations=[
            Continuation(context="one two three four five six seven ", continuation="eight"),
            Continuation(context="", continuation="alone"),
        ]
    )
    assert write_rows(tmp_path / "r.parquet", requests, tokenizer, 6) == 1
    cut, alone = pq.read_table(tmp_path / "r.parquet").to_pylist()
    learned = [[token for token in row["labels"] if token != -100] for row in (cut, alone)]
    assert len(cut["input_ids"]) == 6
    assert [tokenizer.decode(tokens).strip() for tokens in learned] == ["eight", "alone"]


def test_lengths_have_lm_evals_names_and_default() -> None:
    assert generated_of("a", {"until": "x"}).until == ("x",)
    assert generated_of("a", {}).max_new_tokens == 256
    assert generated_of("a", {"max_new_tokens": 5, "temperature": 0.0}).max_new_tokens == 5


def test_training_never_sees_lm_eval_nor_what_it_brings() -> None:
    code = (
        "import sys, finetune_trainer.train.run;"
        "print([m for m in sys.modules if m.partition('.')[0] in ('lm_eval', 'sklearn', 'scipy')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
