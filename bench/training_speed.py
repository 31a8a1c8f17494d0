"""Training tokens a second, peak anonymous memory and held-out loss of our train stage, against a plain trl SFTTrainer script.

    python -m bench.training_speed [--methods LoRA,QLoRA] [--pairs 5] [--steps 6] [--packing] [--float32-adapters] [--without-speed] [--json FILE]

Both train the same random Llama (52M parameters, a 400-token vocabulary) on the same rows in the same order: conversations of varied length,
16 a step in micro-batches of 4, on the CPU, in the type that suits it, with as many threads; LoRA on all linear layers from the same
initial weights. Each run is a process of its own, one after the other, in alternating pairs; a pair has its seed, which sets rows,
order and adapter.

Tokens (without padding) a second are those of the steps after the warm-up, by the monotonic clock, from one step's end to the last one's.
A second of CPU time (of all threads of the process) tells the same where others use the machine meanwhile.
Anonymous memory is sampled from outside, of all processes (ours has a supervisor): until the last step, and until the adapter is saved. The held-out
loss of both is measured by the same function. With --packing a pair has another run: trl with its packing, which is its padding-free mode. With
--float32-adapters another: trl, whose QLoRA trains bfloat16 matrices, with float32 ones as ours are. --without-speed leaves the speeds out, where
other work on the machine makes them meaningless; memory and loss do not depend on it.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import tempfile
import uuid
from dataclasses import asdict
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import finetune_trainer.train  # noqa: F401 - sets how threads wait, for the processes that are started here
from bench import figures, sampled
from bench.pairs import Ratio, alternating, ratio
from finetune_api import names, results
from finetune_trainer.supervisor.place import ENV_LOG_LEVEL
from finetune_trainer.train.device import cpu_dtype, usable_cpus
from finetune_trainer.train.rows import read_rows
from finetune_trainer.train.schedule import make_schedule
from tests.support import seaweed, tiny_model
from tests.support.prepared import PreparedJob, job_spec, snapshot_of, write_prepared

MICRO_BATCH, ACCUMULATION = 4, 4
STEP_ROWS = MICRO_BATCH * ACCUMULATION
HELD_OUT_ROWS = 24
MAX_TOKENS = 512
RANK = 16
LEARNING_RATE = 2e-4
LOSS = "held_out_loss"
SPEEDS = ("tokens_per_second", "tokens_per_cpu_second")
WARM_UP = 2
"""Steps that are not timed: the first allocations, the first checkpoint, the learning rate's own warm-up."""
OURS, TRL, PACKED, FLOAT32 = "ours", "trl", "trl packed", "trl float32"
SCRIPTS = {OURS: "bench.our_train", **dict.fromkeys((TRL, PACKED, FLOAT32), "bench.trl_train")}


def write_model(folder: Path) -> Path:
    """A random Llama with the tests' tokenizer, in bfloat16."""
    folder.mkdir(parents=True)
    tiny_model.write_tokenizer(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tiny_model.VOCABULARY, hidden_size=576, intermediate_size=1536, num_hidden_layers=13,
        num_attention_heads=9, num_key_value_heads=9, max_position_embeddings=2 * MAX_TOKENS,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def conversations(count: int, seed: int) -> list[list[dict[str, str]]]:
    """Questions and answers with the lengths of chats (log-normal; most are short, some are long), of words that a model can learn."""
    draw = random.Random(seed)
    words = " ".join(tiny_model.CORPUS).split()

    def text(median_words: float, most: int) -> str:
        return " ".join(draw.choices(words, k=min(most, max(3, round(draw.lognormvariate(0, 0.8) * median_words)))))

    return [
        [{"role": "user", "content": text(16, 80)}, {"role": "assistant", "content": text(26, 120)}]
        for _ in range(count)
    ]


class Workshop:
    """A model, a bucket, and jobs on them."""

    def __init__(self, folder: Path, endpoint: str, steps: int) -> None:
        self.folder = folder
        self.steps = steps
        self.threads = int(os.environ.get("OMP_NUM_THREADS", usable_cpus()))
        self.model = write_model(folder / "model")
        self.endpoint = endpoint
        self.bucket = "bench"
        keys = {"aws_access_key_id": seaweed.ACCESS_KEY, "aws_secret_access_key": seaweed.SECRET_KEY}
        client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1", **keys)
        client.create_bucket(Bucket=self.bucket)
        for path in self.model.iterdir():
            client.upload_file(str(path), self.bucket, f"base/{path.name}")

    def prepared(self, method: str, seed: int) -> tuple[PreparedJob, Path]:
        """What the prepare stage would have left, and the training rows in the schedule's order as trl takes them."""
        job = PreparedJob(self.snapshot(method, seed), self.bucket, self.folder / uuid.uuid4().hex)
        for slot, (name, value) in [(s, kv) for s in ("model", "output") for kv in self.secret().items()]:
            (job.folder / "secrets" / slot).mkdir(parents=True, exist_ok=True)
            (job.folder / "secrets" / slot / name).write_text(value)
        (job.folder / "snapshot").mkdir()
        (job.folder / "snapshot" / names.SNAPSHOT_KEY).write_text(job.snapshot.canonical_json())
        train, held_out = conversations(self.steps * STEP_ROWS, seed), conversations(HELD_OUT_ROWS, 1000 + seed)
        write_prepared(job, self.model, train, held_out, prompts=1)
        rows = read_rows(job.folder / "prepared" / results.PREPARED_TRAIN)
        longest = max(rows.length(i) for i in range(len(rows)))
        assert longest <= MAX_TOKENS, longest
        schedule = make_schedule(len(rows), job.snapshot.spec.training.length, STEP_ROWS, seed)
        order = [row for step in range(schedule.steps) for row in schedule.step_rows(step)]
        learned = [[int(label != results.IGNORED) for label in rows.labels(i)] for i in order]
        ordered = job.folder / "ordered.parquet"
        pq.write_table(pa.table({"input_ids": [rows.ids(i) for i in order], "completion_mask": learned}), ordered)
        return job, ordered

    def snapshot(self, method: str, seed: int) -> Any:
        """Of the job that is compared."""
        spec = job_spec(
            None,
            self.bucket,
            method={"type": method, "lora": {"rank": RANK}},
            training={
                "length": {"epochs": 1},
                "globalBatchSequences": STEP_ROWS,
                "microBatchSequences": MICRO_BATCH,
                "maxSequenceTokens": MAX_TOKENS,
                "optimizer": {"learningRate": LEARNING_RATE},
                "warmup": {"steps": WARM_UP},
                "seed": seed,
            },
            evaluation={"generation": {"prompts": 1}},
        )
        return snapshot_of(spec, uuid.uuid4().hex)

    def secret(self) -> dict[str, str]:
        """As the kubelet mounts it."""
        return {
            "AWS_ACCESS_KEY_ID": seaweed.WRITER_KEY,
            "AWS_SECRET_ACCESS_KEY": seaweed.WRITER_SECRET,
            "AWS_ENDPOINT_URL": self.endpoint,
        }

    def run(self, way: str, job: PreparedJob, ordered: Path, method: str, seed: int) -> dict[str, float]:
        """One training in a process of its own."""
        folder = job.folder if way == OURS else job.folder / way.replace(" ", "-")
        folder.mkdir(exist_ok=True)
        asked = {
            "folder": str(folder), "model": str(self.model), "train": str(ordered),
            "held_out": str(job.folder / "prepared" / results.PREPARED_HELD_OUT),
            "method": method, "rank": RANK, "seed": seed, "learning_rate": LEARNING_RATE, "warmup_steps": WARM_UP,
            "micro_batch": MICRO_BATCH, "accumulation": ACCUMULATION, "max_tokens": MAX_TOKENS,
            "packing": way == PACKED, "float32_adapters": way == FLOAT32, "dtype": str(cpu_dtype()).removeprefix("torch."),
        }  # fmt: skip
        if way == PACKED:  # two packs of up to 512 tokens a micro-batch, and about as many tokens a step
            asked |= {"micro_batch": 2, "accumulation": ACCUMULATION // 2}
        (folder / "asked.json").write_text(json.dumps(asked))
        environ = {"OMP_NUM_THREADS": str(self.threads), names.ENV_POD_UID: "bench", ENV_LOG_LEVEL: "WARNING"}
        run = sampled.run(SCRIPTS[way], [str(folder / "asked.json")], folder / "log", environ)
        return measured(run, step_tokens(ordered))


def step_tokens(ordered: Path) -> list[int]:
    """Tokens of each step of the schedule, without padding."""
    lengths = [len(row) for row in pq.read_table(ordered)["input_ids"].to_pylist()]
    return [sum(lengths[i : i + STEP_ROWS]) for i in range(0, len(lengths), STEP_ROWS)]


def measured(run: sampled.Run, tokens: list[int]) -> dict[str, float]:
    """The numbers of a run."""
    told = run.told
    ends, cpu, tokens = told["step_ends"], told["step_cpu"], told.get("step_tokens", tokens)
    assert len(ends) == len(tokens), f"{len(ends)} steps were made of {len(tokens)}"
    timed = sum(tokens[WARM_UP:])
    return {
        "tokens_per_second": timed / (ends[-1] - ends[WARM_UP - 1]),
        "tokens_per_cpu_second": timed / (cpu[-1] - cpu[WARM_UP - 1]),
        "training_mib": run.peak_mib(until=ends[-1]),
        "saved_mib": run.peak_mib(until=told["ended"]),
        LOSS: told["held_out_loss"],
    }


def compare(pairs: list[dict[str, dict[str, float]]], other: str) -> dict[str, Any]:
    """Ratios of what was measured, and the differences of the losses."""

    def of(name: str) -> Ratio:
        return ratio([p[OURS][name] for p in pairs], [p[other][name] for p in pairs])

    differences = [p[OURS][LOSS] - p[other][LOSS] for p in pairs]
    return {
        **{name: of(name) for name in pairs[0][OURS] if name != LOSS},
        "held_out_loss_difference": {
            "median": statistics.median(differences),
            "lowest": min(differences),
            "highest": max(differences),
            "spread_between_seeds": statistics.pstdev(p[OURS][LOSS] for p in pairs),
        },
    }


def in_json(compared: dict[str, Any]) -> dict[str, Any]:
    """Ratios as their parts."""
    return {name: asdict(value) if isinstance(value, Ratio) else value for name, value in compared.items()}


def main() -> None:
    """Measure in alternating pairs, and print."""
    parser = figures.parser_of(__doc__)
    parser.add_argument("--methods", default="LoRA,QLoRA")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help=f"optimizer steps, of which {WARM_UP} are not timed")
    parser.add_argument("--packing", action="store_true", help="also trl with packing")
    parser.add_argument("--float32-adapters", action="store_true", help="also trl with its adapters in float32")
    parser.add_argument("--without-speed", action="store_true", help="leave the speeds out, on a busy machine")
    arguments = parser.parse_args()
    left_out = SPEEDS if arguments.without_speed else ()
    ways = [OURS, TRL, *([PACKED] if arguments.packing else []), *([FLOAT32] if arguments.float32_adapters else [])]
    found: dict[str, Any] = {"steps": arguments.steps, "dtype": str(cpu_dtype()).removeprefix("torch.")}
    with tempfile.TemporaryDirectory() as scratch:
        server = seaweed.start_seaweed(Path(scratch) / "s3")
        try:
            shop = Workshop(Path(scratch), server.endpoint, arguments.steps)
            found["threads"] = shop.threads
            for method in arguments.methods.split(","):
                pairs: list[dict[str, dict[str, float]]] = []
                for number in range(arguments.pairs):
                    job, ordered = shop.prepared(method, number)
                    runs = {way: shop.run(way, job, ordered, method, number) for way in alternating(number, ways)}
                    runs = {way: {k: v for k, v in run.items() if k not in left_out} for way, run in runs.items()}
                    pairs.append(runs)
                    print(
                        method, json.dumps({w: {k: round(v, 4) for k, v in runs[w].items()} for w in ways}), flush=True
                    )
                    compared = {other: compare(pairs, other) for other in ways[1:]}
                    found[method] = {"pairs": pairs, **{f"against {w}": in_json(c) for w, c in compared.items()}}
                    figures.write(arguments.json, found)  # a run that is cut short leaves what it has measured
                for other, values in compared.items():
                    for name, value in values.items():
                        print(f"{method}, {OURS} / {other}: {name} {value}", flush=True)
        finally:
            server.stop()


if __name__ == "__main__":
    main()
