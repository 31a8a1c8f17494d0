"""The prepare stage as a whole, against a real S3 server and a hub: what it leaves, how it fails, waits and repeats."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import finetune_trainer.prepare.run as stage
from finetune_api.failures import Reason
from finetune_api.results import PrepareReport, PrepareResult
from finetune_trainer import waiting
from finetune_trainer.context import StageContext
from finetune_trainer.errors import StageError
from finetune_trainer.prepare.chat import load_tokenizer
from tests.support import seaweed
from tests.support.hub_server import HubServer
from tests.support.tiny_model import build_tiny_model, write_tokenizer
from tests.support.trainer_run import Pod, merged
from tests.trainer.conftest import S3

WORKSPACE = "out/job-0a1b2c3d/workspace/"
REF = {"secretRef": {"name": "s3"}}


def row(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def lines(rows: list[Any]) -> str:
    return "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows)


ROWS = [row(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(40)]


class Bench:
    """A pod, a bucket with model and data, and the smallest spec that trains them."""

    def __init__(self, root: Path, s3: S3, model: Path) -> None:
        self.s3 = s3
        self.bucket = s3.new_bucket()
        self.pod = Pod(root)
        s3.put_dir(self.bucket, "model", model)
        for slot in ("model", "output", "train-0", "held-out-0"):
            s3.write_secret(self.pod.secrets / slot)
        self.spec: dict[str, Any] = {
            "model": {"uri": f"s3://{self.bucket}/model", **REF},
            "data": {"train": [{"uri": f"s3://{self.bucket}/train.jsonl", **REF}]},
            "output": {"uri": f"s3://{self.bucket}/out", **REF},
        }

    def put(self, rows: list[Any], name: str = "train.jsonl") -> None:
        self.s3.put(self.bucket, name, lines(rows))

    def context(self, changes: dict[str, Any]) -> StageContext:
        """A new pod: what the last one downloaded is gone."""
        shutil.rmtree(self.pod.work, ignore_errors=True)
        return self.pod.context(merged(self.spec, changes))

    def run(self, **changes: Any) -> PrepareReport:
        return stage.run(self.context(changes))

    def fails(self, **changes: Any) -> StageError:
        with pytest.raises(StageError) as info:
            self.run(**changes)
        return info.value

    def object(self, name: str) -> bytes:
        return self.s3.client.get_object(Bucket=self.bucket, Key=WORKSPACE + name)["Body"].read()

    def table(self, side: str) -> Any:
        return pq.read_table(io.BytesIO(self.object(f"prepare/{side}.parquet")))


@pytest.fixture
def bench(tmp_path: Path, s3: S3, tiny_model: Path) -> Bench:
    return Bench(tmp_path / "pod", s3, tiny_model)


@pytest.fixture(autouse=True)
def _no_real_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that waits where it should fail must not hang a test."""

    def never(seconds: float) -> None:
        raise AssertionError("the stage waits")

    monkeypatch.setattr(waiting, "pause", never)


def test_prepared_rows_results_and_prompts_agree(bench: Bench, tiny_model: Path) -> None:
    bench.put([*ROWS, ROWS[3]])
    report = bench.run()
    result = PrepareResult.model_validate_json(bench.object("prepare/result.json"))
    train, held = bench.table("train"), bench.table("held_out")
    assert (report.data.rows, report.data.train_rows, report.data.held_out_rows) == (41, train.num_rows, held.num_rows)
    assert (report.data.held_out_rows, report.data.duplicate_rows, report.data.formats) == (4, 1, {"Messages": 41})
    assert report.total_steps == -(-3 * train.num_rows // 16)
    assert sorted(train["row"].to_pylist() + held["row"].to_pylist()) == list(range(41))
    assert train.schema.metadata[b"finetune.prepared_version"] == b"1"
    assert [(f.path, f.size, f.sha256) for f in result.files] == [
        (name, len(bench.object(name)), hashlib.sha256(bench.object(name)).hexdigest())
        for name in ("prepare/train.parquet", "prepare/held_out.parquet", "prepare/prompts.json")
    ]
    targets = sum(label != -100 for labels in held["labels"].to_pylist() for label in labels[1:])
    assert report.data.held_out_target_tokens == targets
    assert report.data.held_out_tokens == sum(map(len, held["input_ids"].to_pylist()))
    tokenizer = load_tokenizer(tiny_model, False)
    prompts = json.loads(bench.object("prepare/prompts.json"))
    assert [p["row"] for p in prompts] == held["row"].to_pylist()[:3]
    for prompt in prompts:
        number = prompt["row"]
        assert held["source"].to_pylist()[held["row"].to_pylist().index(number)] == f"train.jsonl:{number + 1}"
        assert prompt["prompt"] == f"What is {number} plus {number}?"
        assert prompt["reference"] == f"It is {2 * number}."
        assert prompt["text"] == f"<|im_start|>user\n{prompt['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(prompt["inputIds"]) == prompt["text"]
        assert prompt["messages"] == [{"role": "user", "content": prompt["prompt"]}]


def test_the_data_hash_depends_on_rows_only(bench: Bench) -> None:
    bench.put(ROWS)
    first = bench.run().data_hash
    bench.s3.put(bench.bucket, "same.json", json.dumps(ROWS))
    same = {"data": {"train": [{"uri": f"s3://{bench.bucket}/same.json", **REF}]}}
    assert bench.run(**same).data_hash == first
    assert bench.run(training={"seed": 7}).data_hash != first
    assert bench.run(objective={"sft": {"lossOn": "All"}}).data_hash != first


def test_a_second_run_finds_the_first_ones_result_and_only_that_of_this_very_run(bench: Bench) -> None:
    bench.put(ROWS)
    first = bench.run()
    written = bench.s3.client.head_object(Bucket=bench.bucket, Key=WORKSPACE + "prepare/train.parquet")["LastModified"]
    bench.put(["no longer readable"])
    assert bench.run() == first
    assert (
        bench.s3.client.head_object(Bucket=bench.bucket, Key=WORKSPACE + "prepare/train.parquet")["LastModified"]
        == written
    )
    assert bench.fails(training={"seed": 1}).reason is Reason.INVALID_DATA  # another snapshot
    bench.s3.client.delete_object(Bucket=bench.bucket, Key=WORKSPACE + "prepare/held_out.parquet")
    assert bench.fails().reason is Reason.INVALID_DATA  # a file is gone
    bench.put(ROWS)
    bench.s3.put(bench.bucket, WORKSPACE + "prepare/result.json", "{torn")
    assert bench.run() == first


def test_the_write_test_leaves_nothing_behind(bench: Bench) -> None:
    bench.put(ROWS)
    bench.run()
    assert sorted(k.removeprefix(WORKSPACE) for k in bench.s3.keys(bench.bucket, "out")) == [
        "prepare/held_out.parquet", "prepare/prompts.json", "prepare/result.json", "prepare/train.parquet",
    ]  # fmt: skip


def test_bad_rows_fail_with_file_line_and_field(bench: Bench) -> None:
    rows: list[Any] = [*ROWS]
    rows[16] = {"messages": [*ROWS[0]["messages"], {"role": "user", "content": None}, ROWS[0]["messages"][1]]}
    rows[20] = {"messages": ROWS[0]["messages"][:1]}
    rows[30] = "<html>"
    bench.put(rows)
    error = bench.fails()
    assert error.reason is Reason.INVALID_DATA
    assert error.message == (
        "3 of 40 rows cannot be used (limit 0). train.jsonl:17 messages[2].content: expected text, found null; "
        "train.jsonl:21 messages: last turn is \"user\", nothing to learn; train.jsonl:31 not JSON (col 1: '<html>')."
    )
    report = bench.run(data={"checks": {"maxBadRows": 3}})
    assert (report.data.rows, report.data.bad_rows, report.data.train_rows + report.data.held_out_rows) == (40, 3, 37)
    assert any("3 rows cannot be used and are left out" in w for w in report.warnings)


def test_many_bad_rows_are_all_counted_and_the_first_are_named(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.put(["x" * 300] * 500 + ROWS)
    error = bench.fails()
    assert error.message.startswith("500 of 540 rows cannot be used (limit 0). train.jsonl:1 not JSON")
    assert error.message.endswith("more, the first 20 in the log.")
    assert len(error.message) < 1500
    assert sum("not JSON" in r.message for r in caplog.records) == 20


LONG = row("word " * 200, "answer")
BAD_INPUT: dict[str, tuple[list[Any], dict[str, Any], Reason, str]] = {
    "wrong columns": ([{"question": "q", "answer": "a"}], {}, Reason.INVALID_DATA, "wrong columns: expected messages |"),
    "an empty file": ([], {}, Reason.TOO_FEW_ROWS, "holds no rows"),
    "one row": (ROWS[:1], {}, Reason.TOO_FEW_ROWS, "1 usable row"),
    "one prompt only": ([ROWS[0]] * 5, {}, Reason.TOO_FEW_ROWS, "5 usable rows with one and the same prompt"),
    "empty after filtering": (
        [LONG] * 3, {"training": {"maxSequenceTokens": 16}}, Reason.TOO_FEW_ROWS, "none of 3 rows is left: 0 cannot be used, 3 dropped"
    ),
    "nothing but budgeted bad rows": (
        ["x"] * 3, {"data": {"checks": {"maxBadRows": 9}}}, Reason.TOO_FEW_ROWS, "none of 3 rows is left: 3 cannot be used"
    ),
    "overlength is not allowed": (
        [*ROWS, LONG], {"training": {"maxSequenceTokens": 64}, "data": {"checks": {"overlength": "Fail"}}},
        Reason.INVALID_DATA, "expected at most 64"
    ),
    "unknown target module": (
        ROWS, {"method": {"lora": {"targetModules": ["q_proj", "query"]}}}, Reason.UNKNOWN_TARGET_MODULE,
        "query does not exist in this model, which has down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    ),
    "the output head": (ROWS, {"method": {"lora": {"targetModules": ["lm_head"]}}}, Reason.INVALID_CONFIG, "cannot be adapted"),
    "no such model": (ROWS, {"model": {"uri": "s3://BUCKET/none"}}, Reason.MODEL_NOT_FOUND, "there is nothing below"),
    "no such bucket": (ROWS, {"output": {"uri": "s3://no-such-bucket/x"}}, Reason.BUCKET_NOT_FOUND, "no-such-bucket"),
    "an unknown column mapping": (
        ROWS, {"data": {"train": [{"uri": "s3://BUCKET/train.jsonl", "columns": {"question": "x"}, **REF}]}}, Reason.INVALID_CONFIG,
        "question is no field"
    ),
    "no such dataset": (
        ROWS, {"data": {"train": [{"uri": "s3://BUCKET/none.jsonl", **REF}]}}, Reason.DATASET_NOT_FOUND, "there is nothing at"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_INPUT, ids=lambda case: case)
def test_bad_input_fails_with_reason_and_finding(bench: Bench, case: str) -> None:
    rows, changes, reason, text = BAD_INPUT[case]
    bench.put(rows)
    error = bench.fails(**json.loads(json.dumps(changes).replace("BUCKET", bench.bucket)))
    assert error.reason is reason
    assert text in error.message


@pytest.mark.parametrize("slot", ["model", "output", "train-0"])
def test_wrong_credentials_fail_wherever_they_stand(bench: Bench, slot: str) -> None:
    bench.put(ROWS)
    bench.s3.write_secret(bench.pod.secrets / slot, secret="wrong")
    assert bench.fails().reason is Reason.ACCESS_DENIED


def test_an_output_that_may_only_be_read_is_found_before_the_data_are(bench: Bench) -> None:
    bench.put(["broken"])
    bench.s3.write_secret(bench.pod.secrets / "output", key=seaweed.READER_KEY, secret=seaweed.READER_SECRET)
    error = bench.fails()
    assert error.reason is Reason.ACCESS_DENIED
    assert "PutObject" in error.message


def test_a_gated_model_without_token_fails(bench: Bench, hub: HubServer, tiny_model: Path) -> None:
    bench.put(ROWS)
    hub.add_model("org/tiny", tiny_model, gated=True)
    assert (
        bench.fails(model={"uri": "hf://org/tiny", "endpointURL": hub.endpoint, "secretRef": None}).reason
        is Reason.GATED_MODEL
    )


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"architectures": ["BertModel"]}, "is a BertModel; expected a causal language model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is quantized already (gptq)"),
    ],
)
def test_models_of_other_kinds_are_refused(bench: Bench, tiny_model: Path, change: dict[str, Any], text: str) -> None:
    bench.put(ROWS)
    config = json.loads((tiny_model / "config.json").read_text())
    bench.s3.put(bench.bucket, "model/config.json", json.dumps({**config, **change}))
    error = bench.fails()
    assert error.reason is Reason.UNSUPPORTED_MODEL
    assert text in error.message


def test_conversations_need_a_chat_template_and_texts_do_not(bench: Bench, tmp_path: Path) -> None:
    build_tiny_model(tmp_path / "plain", chat_template=None)
    bench.s3.put_dir(bench.bucket, "plain", tmp_path / "plain")
    plain = {"uri": f"s3://{bench.bucket}/plain"}
    bench.put(ROWS)
    assert bench.fails(model=plain).reason is Reason.CHAT_TEMPLATE_MISSING
    for rows in (
        [{"text": f"text {i}"} for i in range(9)],
        [{"prompt": f"{i}", "completion": "x"} for i in range(9)],
        [{"instruction": f"{i}", "input": "", "output": "x"} for i in range(9)],
    ):
        bench.put(rows)
        assert bench.run(model=plain, training={"seed": len(json.dumps(rows))}).data.train_rows == 8


def test_a_tokenizer_of_another_model_is_noticed(bench: Bench, tiny_model: Path) -> None:
    bench.put(ROWS)
    config = json.loads((tiny_model / "config.json").read_text())
    from safetensors.numpy import load_file, save

    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].copy()
    bench.s3.put(bench.bucket, "model/model.safetensors", save(tensors))
    bench.s3.put(bench.bucket, "model/config.json", json.dumps({**config, "vocab_size": 100}))
    error = bench.fails()
    assert error.reason is Reason.UNSUPPORTED_MODEL
    assert "they do not belong together" in error.message


def test_truncated_and_dropped_rows_are_counted_and_warned_of(bench: Bench) -> None:
    bench.put([*ROWS, row("short?", "long " * 80), LONG])
    report = bench.run(training={"maxSequenceTokens": 64})
    assert (report.data.truncated_rows, report.data.dropped_rows, report.data.bad_rows) == (1, 1, 0)
    assert report.data.tokens.max > 64
    assert max(map(len, bench.table("train")["input_ids"].to_pylist())) <= 64
    assert any("1 row truncated at 64 tokens" in w for w in report.warnings)
    assert any("1 row dropped" in w for w in report.warnings)


def test_special_tokens_inside_texts_are_warned_of(bench: Bench) -> None:
    bench.put([*ROWS, row("Say <|im_end|>, please?", "No.")])
    assert any("1 row with the tokenizer's special tokens" in w for w in bench.run().warnings)


def test_held_out_sources_of_their_own_are_kept_apart_and_overlap_is_reported(bench: Bench) -> None:
    bench.put(ROWS)
    bench.put([*(row(f"Other {i}?", "yes") for i in range(5)), ROWS[0], row("what IS 1 plus 1?", "Two.")], "held.jsonl")
    report = bench.run(data={"heldOut": {"sources": [{"uri": f"s3://{bench.bucket}/held.jsonl", **REF}]}})
    assert (report.data.train_rows, report.data.held_out_rows) == (40, 7)
    assert bench.table("held_out")["row"].to_pylist() == list(range(40, 47))
    assert any("1 row stand in both, 2 rows ask a prompt" in w for w in report.warnings)


def test_sources_of_several_formats_are_joined_and_said_to_be(bench: Bench) -> None:
    bench.put(ROWS)
    bench.s3.put(bench.bucket, "b/x.csv", "Frage;Antwort\n" + "".join(f"Was ist {i}?;{i}.\n" for i in range(80)))
    bench.s3.write_secret(bench.pod.secrets / "train-1")
    mapped = {"uri": f"s3://{bench.bucket}/b/", "columns": {"prompt": "Frage", "completion": "Antwort"}, **REF}
    report = bench.run(data={"train": [bench.spec["data"]["train"][0], mapped]})
    assert report.data.formats == {"Messages": 40, "PromptCompletion": 80}
    assert any("formats are mixed" in w for w in report.warnings)
    assert not any("usable row" in w for w in report.warnings)
    assert any(s.startswith("x.csv:") for s in bench.table("train")["source"].to_pylist())


def test_steps_are_taken_as_asked_for(bench: Bench) -> None:
    bench.put(ROWS)
    assert bench.run(training={"length": {"steps": 7, "epochs": None}}).total_steps == 7
    assert bench.run(training={"length": {"epochs": 0.5}, "globalBatchSequences": 10}).total_steps == 2


def mended(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, mend: Callable[[], None], **changes: Any
) -> list[tuple[str, str]]:
    """Run; each pause is recorded with what was reported, and the second one mends."""
    ctx = bench.context(changes)
    seen: list[tuple[str, str]] = []

    def pause(seconds: float) -> None:
        reported = ctx.reporter._waiting
        assert reported is not None
        seen.append((reported.reason, reported.message))
        assert 0 < seconds <= 11
        if len(seen) == 2:
            mend()

    monkeypatch.setattr(waiting, "pause", pause)
    stage.run(ctx)
    assert ctx.reporter._waiting is None
    return seen


def test_missing_secrets_are_waited_for_and_used_when_they_appear(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(ROWS)
    for slot in ("output", "model", "train-0"):
        for file in (bench.pod.secrets / slot).iterdir():
            file.unlink()
        restore = partial(bench.s3.write_secret, bench.pod.secrets / slot)
        seen = mended(bench, monkeypatch, restore, training={"seed": len(slot)})
        assert [reason for reason, _ in seen] == [Reason.SECRET_MISSING] * 2
        assert f"Secret s3 (for {slot}) does not exist or is empty" in seen[0][1]


def test_unreachable_endpoints_are_waited_for_and_used_when_they_answer(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.put(ROWS)
    for slot in ("output", "train-0"):
        bench.s3.write_secret(bench.pod.secrets / slot, endpoint="http://127.0.0.1:9")
        restore = partial(bench.s3.write_secret, bench.pod.secrets / slot)
        seen = mended(bench, monkeypatch, restore, training={"seed": len(slot)})
        assert {reason for reason, _ in seen} == {Reason.STORAGE_UNAVAILABLE}
        assert "http://127.0.0.1:9" in seen[0][1]


def test_a_hub_that_fails_is_waited_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, hub: HubServer, tiny_model: Path
) -> None:
    bench.put(ROWS)
    hub.add_model("org/tiny", tiny_model)
    hub.faults.unavailable = -1
    change = {"uri": "hf://org/tiny", "endpointURL": hub.endpoint, "secretRef": None}
    seen = mended(bench, monkeypatch, lambda: setattr(hub.faults, "unavailable", 0), model=change)
    assert {reason for reason, _ in seen} == {Reason.HUB_UNAVAILABLE}
    assert PrepareResult.model_validate_json(bench.object("prepare/result.json")).model_commit


TORCH_FREE = """
import json, sys
sys.modules["torch"] = None  # importing it fails, looking for it finds nothing: as in the slim image
import pickle, pathlib
root, spec = sys.argv[1], json.loads(sys.argv[2])
from tests.support.trainer_run import Pod
from finetune_trainer.entrypoint import main
pod = Pod(pathlib.Path(root))
code = main(["prepare"], termination_log=pathlib.Path(root) / "termination-log", context=lambda stage: pod.context(spec, stage))
forbidden = {"torch", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "kubernetes", "kopf"}
loaded = {name.partition(".")[0] for name, module in sys.modules.items() if module is not None}
assert not forbidden & loaded, forbidden & loaded
sys.exit(code)
"""


def test_prepare_runs_without_torch(bench: Bench) -> None:
    bench.put(ROWS)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, "-c", TORCH_FREE, str(bench.pod.root), json.dumps(bench.spec)],
        cwd=root, env={"PYTHONPATH": root, "PATH": "/usr/bin"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads((bench.pod.root / "termination-log").read_text())
    assert report["succeeded"]
    assert PrepareReport.model_validate(report["result"]).data.rows == 40
    assert "40 rows checked" in done.stderr


def test_tokenizer_hash_changes_with_the_tokenizer(bench: Bench, tmp_path: Path) -> None:
    bench.put(ROWS)
    bench.run()
    before = PrepareResult.model_validate_json(bench.object("prepare/result.json")).tokenizer_hash
    (tmp_path / "t").mkdir()
    write_tokenizer(tmp_path / "t", "{{ messages[0]['role'] + messages[-1]['content'] }}")
    bench.s3.put_dir(bench.bucket, "model", tmp_path / "t")
    bench.run(training={"seed": 5}, objective={"sft": {"lossOn": "Completion"}})
    assert PrepareResult.model_validate_json(bench.object("prepare/result.json")).tokenizer_hash != before
