"""Tasks whose data lie on the Hub: all that can be wrong with them is found out before a GPU is asked for, and later stages need no Hub."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import httpx2
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from ruamel.yaml import YAML
from transformers import AutoTokenizer

from finetune_api.failures import Reason
from finetune_api.results import TaskAnswers, TaskDataset, TaskReplies
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.tasks import prepare_tasks
from finetune_trainer.tasks.child import run_harness
from finetune_trainer.tasks.protocol import REPLIES, REQUESTS, SCORES, Command, Failure, Requests
from finetune_trainer.tasks.troubles import trouble
from tests.support.hub_server import COMMIT, VALID_TOKEN, WEAK_TOKEN, HubServer
from tests.support.tls import localhost_certificate
from tests.trainer.conftest import S3
from tests.trainer.test_tasks import CHOICE, DOCUMENTS, pod_of, spec_of, task

pytestmark = pytest.mark.timeout(900)
OF_HUB = CHOICE.replace("path: json", "path: org/pods").replace(
    "dataset_kwargs: {data_files: {test: data/test.jsonl}}\n", ""
)
STORIES = [
    {
        "ind": i,
        "activity_label": "Pods",
        "ctx_a": "A pod waits.",
        "ctx_b": f"node {i}",
        "ctx": f"A pod waits. Node {i}",
        "endings": ["runs it.", "fails.", "sleeps.", "sings [title] aloud."],
        "label": str(i % 4),
    }
    for i in range(6)
]
SUMS = [{"question": f"What is {i} plus 1?", "answer": f"One more than {i}. #### {i + 1}"} for i in range(8)]
SUMS_CARD = "---\nconfigs:\n- config_name: main\n  data_files:\n  - {split: train, path: main/train-*}\n  - {split: test, path: main/test-*}\n---\n"

FACTS = [
    {
        "id": str(i),
        "question": f"What runs in pod {i}?",
        "choices": {"text": ["A container.", "A marathon.", "A river.", "A joke."], "label": ["A", "B", "C", "D"]},
        "answerKey": key,
    }
    for i, key in enumerate("ABA")
]
SPLITS = ("train", "validation", "test")
FACTS_CARD = (
    "---\nconfigs:\n- config_name: ARC-Easy\n  data_files:\n"
    + "".join(f"  - {{split: {split}, path: ARC-Easy/{split}-*}}\n" for split in SPLITS)
    + "---\n"
)
EXAMPLE = Path(__file__).parents[2] / "examples" / "tasks.yaml"


def publish(hub: HubServer, name: str, folder: Path, files: dict[str, list[dict[str, Any]]], **access: bool) -> Path:
    """A dataset of Parquet files."""
    for path, rows in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / path)
    hub.add_dataset(name, folder, **access)
    return folder


def reach(folder: Path, hub: HubServer, token: str | None) -> None:
    """Keys of the Hub in a Secret."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "HF_ENDPOINT").write_text(hub.endpoint)
    if token is not None:
        (folder / "HF_TOKEN").write_text(token)


def test_the_examples_tasks_and_one_with_code_are_fetched_once_and_scored_when_the_hub_is_gone(
    s3: S3, tiny_model: Path, tmp_path: Path
) -> None:
    """Those of examples/tasks.yaml, and hellaswag, whose documents lm-eval's own code cleans."""
    bucket = s3.new_bucket()
    s3.put(bucket, "tasks/tickets.yaml", CHOICE.replace("task: choice", "task: tickets"))
    s3.put(bucket, "tasks/data/test.jsonl", "".join(json.dumps(document) + "\n" for document in DOCUMENTS))
    pod = pod_of(s3, tmp_path)
    s3.write_secret(pod.secrets / "task-3")
    arc, gsm8k, tickets = YAML(typ="safe").load(EXAMPLE)["spec"]["evaluation"]["tasks"]
    assert (arc["name"], gsm8k["name"], tickets["name"]) == ("arc_easy", "gsm8k", "tickets")
    asked = [
        arc,
        {**gsm8k, "limit": 3, "secretRef": {"name": "hub"}},
        {"name": "hellaswag", "limit": 5},
        {**tickets, "uri": f"s3://{bucket}/tasks/", "limit": 2},
    ]
    with HubServer() as hub:
        facts = publish(
            hub, "allenai/ai2_arc", tmp_path / "a", {f"ARC-Easy/{split}-0.parquet": FACTS for split in SPLITS}
        )
        (facts / "README.md").write_text(FACTS_CARD)
        publish(
            hub,
            "Rowan/hellaswag",
            tmp_path / "h",
            {"data/train-0.parquet": STORIES[:4], "data/validation-0.parquet": STORIES},
        )
        sums = publish(
            hub,
            "openai/gsm8k",
            tmp_path / "g",
            {"main/train-0.parquet": SUMS[3:], "main/test-0.parquet": SUMS},
            gated=True,
        )
        (sums / "README.md").write_text(SUMS_CARD)
        reach(pod.secrets / "task-1", hub, VALID_TOKEN)
        context = pod.context(spec_of(s3, bucket, *asked))
        found = prepare_tasks(context, AutoTokenizer.from_pretrained(tiny_model), None, {}, gathered=False)
        fetched = [path for path in hub.log.paths("GET") if path.endswith(".parquet")]
        assert len(fetched) == len(set(fetched)) == 5, "three of them hold the same bytes"
    assert found.datasets == [
        TaskDataset(dataset="allenai/ai2_arc", commit=COMMIT),
        TaskDataset(dataset="openai/gsm8k", commit=COMMIT),
        TaskDataset(dataset="Rowan/hellaswag", commit=COMMIT),
    ]
    [warning] = found.warnings
    assert warning.startswith("3 requests of 41 "), "five examples are more than the tiny model's positions"
    with tarfile.open(found.files["prepare/tasks.tar"]) as tar:
        assert not any(name.endswith(".parquet") or "/hub/" in name for name in tar.getnames()), "raw data stay behind"
        tar.extractall(tmp_path / "later", filter="data")
    later = tmp_path / "later"
    requests = Requests.model_validate_json((later / REQUESTS).read_bytes())
    own = sum(len(document["choices"]) for document in DOCUMENTS[:2])
    assert (len(requests.continuations), len(requests.generated)) == ((len(FACTS) + 5) * 4 + own, 3)
    assert {(g.max_new_tokens, g.until) for g in requests.generated} == {(256, ("Question:", "</s>", "<|im_end|>"))}
    assert all(g.context.count("Question:") == gsm8k["fewShot"] + 1 for g in requests.generated)

    # Whoever prefers the first ending is right in two of five, and with two of three facts; who says 1 to all is right once.
    likely = [float(-(n % 4)) for n in range(len(requests.continuations))]
    replies = TaskReplies(log_likelihoods=likely, greedy=[False] * len(likely), texts=["#### 1"] * 3)
    better = replies.model_copy(update={"texts": [f"#### {n}" for n in (1, 2, 3)]})
    (later / REPLIES).write_text(TaskAnswers(base=replies, tuned=better).model_dump_json(by_alias=True))
    run_harness(Command.SCORES, later)
    scores = {
        (base["task"], base["metric"], base["filter"]): (base["value"], tuned["value"])
        for base, tuned in json.loads((later / SCORES).read_bytes())
    }
    assert scores["gsm8k", "exact_match", "strict-match"] == pytest.approx((1 / 3, 1.0))
    assert scores["hellaswag", "acc", "none"] == pytest.approx((0.4, 0.4))
    assert scores["arc_easy", "acc", "none"] == pytest.approx((2 / 3, 2 / 3))
    assert ("tickets", "acc", "none") in scores


@pytest.mark.parametrize(
    ("wrong", "reason", "said"),
    [
        ("gated", Reason.ACCESS_DENIED, "'org/pods' is a gated dataset on the Hub. Visit the dataset page"),
        ("missing", Reason.DATASET_NOT_FOUND, "'org/pods' doesn't exist on the Hub or cannot be accessed"),
        ("script", Reason.INVALID_CONFIG, "its data are made by code on the Hub, which is not run"),
        ("refused", Reason.ACCESS_DENIED, "401"),
        ("away", Reason.HUB_UNAVAILABLE, "'org/pods'"),
        ("untrusted", Reason.HUB_UNAVAILABLE, "Couldn't reach 'org/pods' on the Hub"),
        (None, None, ""),
    ],
)  # fmt: skip
def test_what_is_wrong_with_data_of_the_hub_is_said_before_a_gpu(
    s3: S3,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wrong: str | None,
    reason: Reason | None,
    said: str,
) -> None:
    """Of a task of one's own, whose Secret has the Hub's keys beside the bucket's; the last one is as it should be, behind a private CA."""
    monkeypatch.setattr("finetune_trainer.prepare.tasks.wait_until_available", lambda _, fn: fn())
    bucket = s3.new_bucket()
    s3.put(bucket, "tasks/choice.yaml", OF_HUB)
    pod = pod_of(s3, tmp_path)
    ca, tls = localhost_certificate(tmp_path / "tls")
    with HubServer(tls if wrong in (None, "untrusted") else None) as hub:
        if wrong != "missing":
            folder = publish(
                hub, "org/pods", tmp_path / "pods", {"data/test-0.parquet": DOCUMENTS}, gated=wrong in (None, "gated")
            )
            if wrong == "script":
                (folder / "pods.py").write_text("raise SystemExit")
        reach(pod.secrets / "task-0", hub, {"gated": WEAK_TOKEN, "refused": "hf_wrong"}.get(wrong or "", VALID_TOKEN))
        if wrong is None:
            (pod.secrets / "task-0" / "AWS_CA_BUNDLE").write_text(ca.read_text())
        hub.faults.unavailable = -1 if wrong == "away" else 0
        context = pod.context(spec_of(s3, bucket, task(bucket, "choice", limit=2)))
        coder = AutoTokenizer.from_pretrained(tiny_model)
        if reason is None:
            found = prepare_tasks(context, coder, None, {}, gathered=False)
            assert found.datasets == [TaskDataset(dataset="org/pods", commit=COMMIT)]
            return
        with pytest.raises(StageError) as info:
            prepare_tasks(context, coder, None, {}, gathered=False)
    assert info.value.reason is reason
    assert "evaluation.tasks: choice: " in info.value.message
    assert said in info.value.message


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    error.__cause__ = cause
    return error


def answered(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    return kind(f"{status}", response=httpx2.Response(status, request=httpx2.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    ("error", "failure", "offline"),
    [
        (answered(HfHubHTTPError, 503), Failure.AWAY, Failure.UNUSABLE),
        (answered(HfHubHTTPError, 429), Failure.AWAY, Failure.UNUSABLE),
        (answered(HfHubHTTPError, 403), Failure.NOT_ALLOWED, Failure.NOT_ALLOWED),
        (answered(HfHubHTTPError, 400), Failure.UNUSABLE, Failure.UNUSABLE),
        (answered(RepositoryNotFoundError, 401), Failure.NOT_FOUND, Failure.NOT_FOUND),
        (raised(ValueError("x"), answered(GatedRepoError, 403)), Failure.NOT_ALLOWED, Failure.NOT_ALLOWED),
        (raised(RuntimeError("x"), ConnectionError("y")), Failure.AWAY, Failure.UNUSABLE),
        (ModuleNotFoundError("x", name="langdetect.detector"), Failure.UNUSABLE, Failure.UNUSABLE),
    ],
)  # fmt: skip
def test_errors_have_the_words_of_the_failure_table(error: Exception, failure: Failure, offline: Failure) -> None:
    """What waits for the Hub never waits where the Hub is not asked."""
    assert (trouble(error, offline=False).failure, trouble(error, offline=True).failure) == (failure, offline)
    if isinstance(error, ModuleNotFoundError):
        assert "it needs the Python package langdetect, which" in trouble(error, offline=False).message
