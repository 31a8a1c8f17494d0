"""The prepare stage as a whole, against a real S3 server: what it leaves, and how it repeats."""

from __future__ import annotations

import hashlib
import json
import lzma
import subprocess
import sys
from pathlib import Path

from finetune_api.failures import Reason
from finetune_api.results import PrepareReport, PrepareResult, PreviewRow
from finetune_trainer.prepare.chat import chat_template, load_tokenizer
from finetune_trainer.prepare.tokenizer_files import tokenizer_hash
from tests.support.prepare_bench import REF, ROWS, WORKSPACE, Bench, lines, row
from tests.support.tiny_model import write_tokenizer


def test_prepared_rows_results_and_prompts_agree(bench: Bench, tiny_model: Path) -> None:
    bench.put([*ROWS, ROWS[3]])
    report = bench.run()
    result = PrepareResult.model_validate_json(bench.object("prepare/result.json"))
    train, held = bench.table("train"), bench.table("held_out")
    assert (report.data.rows, report.data.train_rows, report.data.held_out_rows) == (41, train.num_rows, held.num_rows)
    assert (report.data.held_out_rows, report.data.duplicate_rows, report.data.formats) == (4, 1, {"Messages": 41})
    assert report.data.held_out_overlap_rows == 0
    assert report.total_steps == -(-3 * train.num_rows // 16)
    assert sorted(train["row"].to_pylist() + held["row"].to_pylist()) == list(range(41))
    assert train.schema.metadata[b"finetune.prepared_version"] == b"1"
    assert [(f.path, f.size, f.sha256) for f in result.files] == [
        (name, len(bench.object(name)), hashlib.sha256(bench.object(name)).hexdigest())
        for name in (
            "prepare/train.parquet",
            "prepare/held_out.parquet",
            "prepare/prompts.json",
            "prepare/preview.json",
        )
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


def test_the_preview_shows_the_first_training_rows_token_by_token(bench: Bench) -> None:
    bench.put(ROWS)
    bench.run()
    preview = [PreviewRow.model_validate(p) for p in json.loads(bench.object("prepare/preview.json"))]
    train = bench.table("train").to_pylist()
    assert [p.source for p in preview] == [stored["source"] for stored in train[:3]]
    for shown, stored in zip(preview, train, strict=False):
        assert (shown.length, shown.input_ids) == (len(stored["input_ids"]), stored["input_ids"])
        number = stored["row"]
        assert "".join(shown.tokens) == (
            f"<|im_start|>user\nWhat is {number} plus {number}?<|im_end|>\n<|im_start|>assistant\nIt is {2 * number}.<|im_end|>\n"
        )
        learned = "".join(text for text, is_learned in zip(shown.tokens, shown.learned, strict=True) if is_learned)
        assert learned == f"It is {2 * number}.<|im_end|>"


def test_every_file_of_the_model_is_recorded_with_what_is_known_of_it(bench: Bench, tiny_model: Path) -> None:
    bench.put(ROWS)
    bench.run()
    result = PrepareResult.model_validate_json(bench.object("prepare/result.json"))
    found = {f.path: f for f in result.model_files}
    assert set(found) == {p.name for p in tiny_model.iterdir()}
    weights = found.pop("model.safetensors")
    head = bench.s3.client.head_object(Bucket=bench.bucket, Key="model/model.safetensors")
    assert (weights.size, weights.sha256, weights.version) == (head["ContentLength"], None, head["ETag"])
    for path, record in found.items():
        assert record.sha256 == hashlib.sha256((tiny_model / path).read_bytes()).hexdigest()


def test_later_stages_get_prompts_to_check_their_tokenizer_on_even_where_none_is_answered(bench: Bench) -> None:
    bench.put(ROWS)
    bench.run(evaluation={"generation": {"prompts": 0}})
    assert len(json.loads(bench.object("prepare/prompts.json"))) == 3


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
        "attempts/prepare-pod-1.json", "prepare/held_out.parquet", "prepare/preview.json", "prepare/prompts.json", "prepare/result.json", "prepare/train.parquet",
    ]  # fmt: skip


def test_where_a_plan_is_enough_everything_is_checked_and_nothing_stored(bench: Bench) -> None:
    bench.put(ROWS)
    whole, alone = bench.run(), bench.run(planOnly=True, output={"uri": f"s3://{bench.bucket}/elsewhere"})
    assert alone == whole
    assert not bench.s3.client.list_objects_v2(Bucket=bench.bucket, Prefix="elsewhere").get("Contents")
    bench.put([{"neither": "prompt", "nor": "answer"}])
    assert bench.fails(planOnly=True).reason is Reason.INVALID_DATA


def test_lengths_are_told_by_percentiles_over_both_sides(bench: Bench) -> None:
    """The shortest length that so many rows do not exceed."""
    bench.put([row(f"{'word ' * n}{n}?", "yes") for n in range(40)])
    found = bench.run().data.tokens
    sides = (bench.table(side)["input_ids"].to_pylist() for side in ("train", "held_out"))
    lengths = sorted(len(ids) for side in sides for ids in side)
    assert [found.p50, found.p95, found.p99, found.max] == [lengths[n - 1] for n in (20, 38, 40, 40)]
    assert found.p50 < found.p95 < found.p99


def test_truncated_and_dropped_rows_are_counted_and_warned_of(bench: Bench) -> None:
    bench.put([*ROWS, row("short?", "long " * 80), row("word " * 200, "answer")])
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
    assert report.data.held_out_overlap_rows == 2
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


def test_a_sources_weight_counts_in_training_and_never_among_held_out_rows(bench: Bench) -> None:
    bench.put(ROWS)
    bench.put([row(f"Other {i}?", "yes") for i in range(60)], "other.jsonl")
    bench.s3.write_secret(bench.pod.secrets / "train-1")
    first = bench.spec["data"]["train"][0]
    other = {**first, "uri": f"s3://{bench.bucket}/other.jsonl", "weight": 0.25}
    report = bench.run(data={"train": [{**first, "weight": 2}, other]})
    train, held = bench.table("train")["row"].to_pylist(), bench.table("held_out")["row"].to_pylist()
    assert report.data.train_rows == len(train)
    assert (len(held), len(set(held))) == (10, 10), "as without weights"
    assert not set(train) & set(held)
    twice = [number for number in train if number < 40]
    assert len(twice) == 2 * len(set(twice)) == 2 * len(set(range(40)) - set(held))
    few = [number for number in train if number >= 40]
    assert 0 < len(few) == len(set(few)) < 30
    assert "raise them" in bench.fails(data={"train": [{**first, "weight": 1e-9}]}).message


def test_rows_of_the_newer_formats_arrive(bench: Bench, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, False)
    shared = [
        {"conversations": [{"from": "human", "value": f"q{i}"}, {"from": "gpt", "value": f"a{i}"}]} for i in range(20)
    ]
    bench.put(shared)
    ids = [tokenizer(f"What is {i}? It is {i}.")["input_ids"] for i in range(20)]
    tokens = [{"input_ids": each, "labels": [-100] * 4 + each[4:]} for each in ids]
    bench.s3.put(bench.bucket, "tokens.jsonl.xz", lzma.compress(lines(tokens).encode()))
    bench.s3.write_secret(bench.pod.secrets / "train-1")
    first = bench.spec["data"]["train"][0]
    report = bench.run(data={"train": [first, {**first, "uri": f"s3://{bench.bucket}/tokens.jsonl.xz"}]})
    assert report.data.formats == {"ShareGPT": 20, "Tokenized": 20}
    prompts = {p["row"]: p for p in json.loads(bench.object("prepare/prompts.json"))}
    for number, prompt in prompts.items():
        if number < 20:
            assert (prompt["prompt"], prompt["reference"]) == (f"q{number}", f"a{number}")
        else:
            assert (prompt["inputIds"], prompt["fromTokens"]) == (ids[number - 20][:4], True)
            assert prompt["prompt"] == tokenizer.decode(ids[number - 20][:4])
    bench.s3.put(bench.bucket, "tokens.jsonl.xz", lzma.compress(lines([{"input_ids": [1, 10**6]}]).encode()))
    sources = [first, {**first, "uri": f"s3://{bench.bucket}/tokens.jsonl.xz"}]
    failed = bench.fails(data={"train": sources}, training={"seed": 2})  # another run than the one before
    assert failed.reason is Reason.INVALID_DATA
    assert "tokens.jsonl.xz:1 input_ids: token 1000000" in failed.message


def test_steps_are_taken_as_asked_for(bench: Bench) -> None:
    bench.put(ROWS)
    assert bench.run(training={"length": {"steps": 7, "epochs": None}}).total_steps == 7
    assert bench.run(training={"length": {"epochs": 0.5}, "globalBatchSequences": 10}).total_steps == 2


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
    write_tokenizer(tmp_path / "t", "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}")
    bench.s3.put_dir(bench.bucket, "model", tmp_path / "t")
    bench.run(training={"seed": 5}, objective={"sft": {"lossOn": "Completion"}})
    assert PrepareResult.model_validate_json(bench.object("prepare/result.json")).tokenizer_hash != before


OWN_TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }} {{ strftime_now('%Y') }}] {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant {{ strftime_now('%Y') }}] {% endif %}"
)


def test_the_jobs_chat_template_takes_the_place_of_the_models(bench: Bench, tiny_model: Path) -> None:
    bench.put(ROWS)
    before = PrepareResult.model_validate_json(bench.object("prepare/result.json")) if bench.run() else None
    report = bench.run(data={"chatTemplate": OWN_TEMPLATE})
    prompts = json.loads(bench.object("prepare/prompts.json"))
    assert all(
        p["text"].startswith("[user 2024] What is ") and p["text"].endswith("[assistant 2024] ") for p in prompts
    )
    after = PrepareResult.model_validate_json(bench.object("prepare/result.json"))
    assert before is not None
    assert after.tokenizer_hash != before.tokenizer_hash
    assert report.data_hash != before.data_hash
    tokenizer = load_tokenizer(tiny_model, False)
    tokenizer.chat_template = OWN_TEMPLATE
    hashes = {f.path: f.sha256 for f in after.model_files if f.sha256}
    assert tokenizer_hash(hashes, chat_template(tokenizer)) == after.tokenizer_hash, "what training computes"


def test_a_broken_template_of_the_job_is_its_own_fault(bench: Bench) -> None:
    bench.put(ROWS)
    for template in ("{% for %}", "{{ raise_exception('no') }}"):
        failed = bench.fails(data={"chatTemplate": template})
        assert (failed.reason, failed.message.partition(": ")[0]) == (Reason.INVALID_CONFIG, "data.chatTemplate")


def test_a_template_that_asks_with_more_than_it_is_trained_with_is_warned_of(bench: Bench, tiny_model: Path) -> None:
    bench.put(ROWS)
    own = chat_template(load_tokenizer(tiny_model, False))
    assert own is not None
    assert not any("stands in no row" in w for w in bench.run().warnings)
    thinks = own.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>\n")
    assert any("asks a model with '<think>\\n'" in w for w in bench.run(data={"chatTemplate": thinks}).warnings)


def test_few_held_out_rows_and_turns_that_do_not_alternate_are_warned_of(bench: Bench) -> None:
    bench.put([row(f"What is {i} plus {i}?", f"It is {2 * i}.") for i in range(400)])
    assert not any("held-out row" in w or "take turns" in w for w in bench.run().warnings)
    odd = {"messages": [{"role": "user", "content": "a?"}, *row("b?", "c")["messages"]]}
    bench.put([*(row(f"Question {i}?", f"Answer {i}.") for i in range(150)), odd])
    warnings = bench.run(training={"seed": 3}).warnings
    assert any("only 15 held-out rows" in w for w in warnings)
    assert any("1 conversation in which user and assistant do not take turns" in w for w in warnings)


def test_token_ids_that_teach_no_end_are_warned_of(bench: Bench, tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, False)
    ids = [tokenizer(f"What is {i}? It is {i}.", add_special_tokens=False)["input_ids"] for i in range(40)]
    bench.put([{"input_ids": [*each, tokenizer.eos_token_id] if i % 2 else each} for i, each in enumerate(ids)])
    assert any("20 rows of token ids without an end-of-turn or EOS token" in w for w in bench.run().warnings)
