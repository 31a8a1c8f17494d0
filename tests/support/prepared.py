"""A job as it stands after the prepare stage, without running it: prepared rows, a base model and a context for the next stage."""

from __future__ import annotations

import hashlib
import json
import uuid
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer

from finetune_api import results
from finetune_api.names import Stage
from finetune_api.results import (
    DataSummary,
    LengthPercentiles,
    PreparedPrompt,
    PrepareResult,
    TrainedTokens,
    TrainedWeights,
)
from finetune_api.snapshot import Images, JobIdentity, Snapshot, make_snapshot
from finetune_api.spec import FineTuneJobSpec
from finetune_trainer.context import StageContext
from finetune_trainer.prepare.chat import chat_template
from finetune_trainer.prepare.full_weights import choose_weights, count_full, trainable_shapes
from finetune_trainer.prepare.shapes import Parameters, count_parameters
from finetune_trainer.prepare.tokenizer_files import tokenizer_hash
from finetune_trainer.prepare.trained_tokens import grown, is_tied, trained_rows, trained_tokens
from finetune_trainer.publish.safetensors_stream import Checkpoint, read_header
from finetune_trainer.reporter import Reporter
from finetune_trainer.sources.model import TensorHeaders
from finetune_trainer.train.schedule import make_schedule

SUBJECTS = ["pod", "node", "job", "secret", "volume", "service", "claim", "queue"]
VERBS = ["runs", "stops", "binds", "waits", "scales", "drains", "mounts"]


class RecordingReporter(Reporter):
    """Keeps what was reported."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage, "execution-1")
        self.posts: list[dict[str, object]] = []

    def report(self, **fields: object) -> None:
        self.posts.append(fields)
        super().report(**fields)


@dataclass(frozen=True)
class PreparedJob:
    """What a test needs of a job between prepare and publish."""

    snapshot: Snapshot
    bucket: str
    folder: Path

    def context(self, stage: Stage = Stage.TRAIN, execution: str = "execution-1") -> StageContext:
        """A context with a fresh work folder."""
        work = self.folder / f"work-{stage}-{uuid.uuid4().hex[:6]}"
        work.mkdir(parents=True)
        return StageContext(
            snapshot=self.snapshot,
            stage=stage,
            execution_id=execution,
            work_dir=work,
            secrets_dir=self.folder / "secrets",
            pvc_dir=self.folder / "pvc",
            reporter=RecordingReporter(stage),
        )

    def with_spec(self, **updates: Any) -> PreparedJob:
        """The same data under another spec (camelCase keys, merged deeply). ``prepare`` must be written again."""
        spec = deep_merge(self.snapshot.spec.to_json_dict(), updates)
        return replace(self, snapshot=snapshot_of(spec, self.snapshot.job.uid))


def questions(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Short conversations of different lengths, all different."""
    rows = []
    for i in range(seed, seed + count):
        subject, verb = SUBJECTS[i % len(SUBJECTS)], VERBS[i // len(SUBJECTS) % len(VERBS)]
        answer = f"The {subject} {verb}" + " and waits" * (i % 4) + "."
        rows.append(
            [{"role": "user", "content": f"What about {subject} {i}?"}, {"role": "assistant", "content": answer}]
        )
    return rows


def job_spec(s3: Any, bucket: str, **updates: Any) -> dict[str, Any]:
    """A small CPU job whose model, data and output lie in ``bucket``; ``lora`` is left out for method Full."""
    spec: dict[str, Any] = {
        "model": {"uri": f"s3://{bucket}/base", "secretRef": {"name": "s3"}},
        "data": {"train": [{"uri": f"s3://{bucket}/train.jsonl", "secretRef": {"name": "s3"}}]},
        "method": {"type": "LoRA", "lora": {"rank": 4, "dropout": 0.0}},
        "training": {
            "useCpu": True,
            "length": {"epochs": 6},
            "globalBatchSequences": 8,
            "maxSequenceTokens": 128,
            "microBatchSequences": 4,
            "gradientCheckpointing": False,
            "optimizer": {"learningRate": 0.01},
        },
        "evaluation": {"generation": {"prompts": 2, "maxNewTokens": 8}},
        "output": {"uri": f"s3://{bucket}/out", "secretRef": {"name": "s3"}},
    }
    merged: dict[str, Any] = deep_merge(spec, updates)
    if merged["method"]["type"] == "Full":
        del merged["method"]["lora"]
    return merged


def deep_merge(old: Any, new: Any) -> Any:
    """``new`` over ``old``, dict by dict; a union's other member gives way."""
    if not isinstance(old, dict) or not isinstance(new, dict):
        return new
    if set(new) & {"epochs", "steps"}:
        return new
    return {**old, **{k: deep_merge(old.get(k), v) for k, v in new.items()}}


def snapshot_of(spec: dict[str, Any], uid: str) -> Snapshot:
    """The snapshot the operator would freeze."""
    return make_snapshot(
        FineTuneJobSpec.model_validate(spec),
        JobIdentity(name="job", namespace="team", uid=uid, generation=1),
        Images(prepare="prepare:1", train="trainer:1"),
        "test",
    )


def prepare_job(
    s3: Any,
    folder: Path,
    model: Path,
    /,
    *,
    train_rows: int = 24,
    held_out_rows: int = 8,
    prompts: int = 2,
    only_checked: int = 0,
    **updates: Any,
) -> PreparedJob:
    """Upload the base and write the prepare stage's files for a spec with ``updates``."""
    bucket = s3.new_bucket()
    s3.put_dir(bucket, "base", model)
    for slot in ("model", "output", "train-0"):
        s3.write_secret(folder / "secrets" / slot)
    job = PreparedJob(snapshot_of(job_spec(s3, bucket, **updates), uuid.uuid4().hex), bucket, folder)
    write_prepared(job, model, questions(train_rows), questions(held_out_rows, seed=100), prompts, only_checked)
    return job


def write_prepared(
    job: PreparedJob,
    model: Path,
    train: list[list[dict[str, str]]],
    held_out: list[list[dict[str, str]]],
    prompts: int,
    only_checked: int = 0,
) -> None:
    """``prepare/`` in the job's workspace; ``only_checked`` prompts more stand beside those to be answered."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    headers = headers_of(model)
    tokens = trained_tokens(tokenizer, job.snapshot.spec, headers)
    counted = count(job.snapshot, model, tokens)
    store = job.context(Stage.PREPARE).workspace_store()
    files = []
    for name, rows in ((results.PREPARED_TRAIN, train), (results.PREPARED_HELD_OUT, held_out)):
        path = job.folder / "prepared" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table([encode(tokenizer, row) for row in rows]), path)
        files.append(store.upload_file(path, name))
    answers = [
        prepared_prompt(tokenizer, i, row).model_copy(update={"answered": i < prompts})
        for i, row in enumerate(held_out[: prompts + only_checked])
    ]
    files.append(store.put_bytes(results.PREPARED_PROMPTS, json.dumps([a.to_json_dict() for a in answers]).encode()))
    training = job.snapshot.spec.training
    schedule = make_schedule(len(train), training.length, training.global_batch_sequences, training.seed)
    store.put_model(
        results.PREPARE_RESULT,
        PrepareResult(
            snapshot_digest=job.snapshot.digest(),
            data=DataSummary(
                rows=len(train) + len(held_out), train_rows=len(train), held_out_rows=len(held_out), bad_rows=0,
                truncated_rows=0, dropped_rows=0, duplicate_rows=0, formats={"Messages": len(train) + len(held_out)},
                train_tokens=1, train_target_tokens=1, held_out_tokens=1, held_out_target_tokens=1,
                tokens=LengthPercentiles(p50=1, p95=1, p99=1, max=1),
            ),
            data_hash=hashlib.sha256(b"data").hexdigest(),
            execution_id="execution-0",
            model_commit=None,
            model_files=[],
            tokenizer_hash=tokenizer_hash(
                {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in model.iterdir()},
                chat_template(tokenizer),
                job.snapshot.spec.model.new_tokens or (),
            ),
            trained_tokens=tokens,
            trainable_parameters=counted.trainable,
            total_parameters=counted.total,
            total_steps=schedule.steps,
            weights=full_weights(job, model),
            files=files,
        ),
    )  # fmt: skip


def count(snapshot: Snapshot, model: Path, tokens: TrainedTokens | None = None) -> Parameters:
    """What the prepare stage counts."""
    headers = headers_of(model)
    config = json.loads((model / "config.json").read_text())
    method, tied = snapshot.plan.method, is_tied(headers, config)
    if method.full is not None:
        return count_full(headers, method.full, tied, snapshot.spec.model.uri)
    if tokens is not None and tokens.resized_to is not None:
        headers = grown(headers, tokens.resized_to)
    return count_parameters(headers, method.lora, trained_rows(headers, config, tokens))


def headers_of(model: Path) -> TensorHeaders:
    """Types and shapes of the tensors in a model's files."""
    return {n: (e["dtype"], tuple(e["shape"])) for p in model.glob("*.safetensors") for n, e in read_header(p).items()}


def full_weights(job: PreparedJob, model: Path) -> TrainedWeights | None:
    """What method Full trains."""
    full = job.snapshot.plan.method.full
    if full is None:
        return None
    tied = bool(json.loads((model / "config.json").read_text()).get("tie_word_embeddings"))
    shapes = {name: info.shape for name, info in Checkpoint(model).tensors.items()}
    return choose_weights(job.context(Stage.PREPARE), trainable_shapes(shapes, tied), full, None)


def encode(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation: the answer and its end token are learned."""
    prompt = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(messages[-1]["content"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    return prompt_ids + answer_ids, [-100] * len(prompt_ids) + answer_ids


def prepared_prompt(tokenizer: Any, row: int, messages: list[dict[str, str]]) -> PreparedPrompt:
    """The prompt of a held-out conversation."""
    text = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
    return PreparedPrompt(
        row=row,
        prompt=messages[-2]["content"],
        reference=messages[-1]["content"],
        messages=messages[:-1],
        text=text,
        input_ids=tokenizer(text, add_special_tokens=False)["input_ids"],
    )


def table(rows: list[tuple[list[int], list[int]]]) -> pa.Table:
    """A prepared Parquet table."""
    return pa.table(
        {
            "row": pa.array(range(len(rows)), pa.int64()),
            "source": pa.array(["test:1"] * len(rows)),
            "input_ids": pa.array([ids for ids, _ in rows], pa.list_(pa.int32())),
            "labels": pa.array([labels for _, labels in rows], pa.list_(pa.int32())),
            "prompt_tokens": pa.array([0] * len(rows), pa.int32()),
        }
    )
