"""How fast rows are checked and tokenised, against ``datasets.map`` that renders and tokenises the same rows and checks nothing.

    python -m bench.prepare_speed [--rows 40000] [--pairs 6] [--gigabytes 5] [--json FILE]

Both go from a file of JSON lines to tokens on disk, with SmolLM2's tokenizer and chat template and two processes. Ours is the prepare
stage's own code: every check, labels, near duplicates, the split and the prepared files. Theirs is ``load_dataset`` and ``map(batched=True,
num_proc=2)`` with ``apply_chat_template`` and one call of the tokenizer a batch: no labels, no checks. The rows are conversations of
sentences from Python's own documentation (``pydoc_data``). Each run is a process of its own; its clock starts after the imports and
includes its worker processes' start. Pairs alternate in one run.

The ratio by CPU seconds, of all processes of a run without the imports of the first, is what other work on the machine disturbs least. Memory is
sampled from outside. ``--gigabytes`` runs ours once on so much data, which takes about an hour for 5 GB on two cores, and tells its memory.
"""

from __future__ import annotations

import json
import os
import pydoc_data.topics
import random
import re
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import figures, process_tree
from bench.pairs import alternating, ratio

OURS, THEIRS = "ours", "datasets.map"
PROCESSES = 2
CLOCK: dict[str, float] = {}


def write_rows(path: Path, count: int | None, size: int | None = None) -> int:
    """Conversations of one or two questions with answers, about a thousand characters each: so many, or so many bytes. Returns how many."""
    words = re.sub(r"\s+", " ", " ".join(pydoc_data.topics.topics.values()))
    sentences = [s for s in re.split(r"(?<=[.:]) ", words) if 20 < len(s) < 400]
    draw = random.Random(7)
    with path.open("w") as file:
        written = 0
        while written != count and (size is None or file.tell() < size):
            turns = []
            for _ in range(draw.choice((1, 1, 2))):
                turns.append({"role": "user", "content": " ".join(draw.choices(sentences, k=draw.randint(1, 3)))})
                turns.append({"role": "assistant", "content": " ".join(draw.choices(sentences, k=draw.randint(2, 8)))})
            file.write(json.dumps({"messages": turns}) + "\n")
            written += 1
    return written


def ours(rows: Path, tokenizer_folder: Path, scratch: Path) -> None:
    """The prepare stage from the file to the prepared rows."""
    import bench.prepare_image
    from finetune_trainer.prepare import workers
    from finetune_trainer.prepare.chat import ChatRenderer, chat_template, load_tokenizer
    from finetune_trainer.prepare.check import check_data
    from finetune_trainer.prepare.finish import finish
    from finetune_trainer.prepare.model import BaseModel
    from finetune_trainer.prepare.shapes import Parameters
    from tests.support.trainer_run import Pod

    workers.PRELOADED[:0] = [bench.prepare_image.__name__]
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # as the stage's entry point sets it
    pod = Pod(scratch)
    (pod.volumes / "data").mkdir(parents=True)
    (pod.volumes / "data" / "rows.jsonl").hardlink_to(rows)
    ctx = pod.context(
        {
            "model": {"uri": "hf://org/name"},
            "data": {"train": [{"uri": "pvc://data/rows.jsonl"}]},
            "output": {"uri": "s3://bucket/out"},
        }
    )
    tokenizer = load_tokenizer(tokenizer_folder, False)
    template = chat_template(tokenizer)
    assert template is not None
    model = BaseModel(
        uri="hf://org/name", commit=None, files=[], tokenizer=tokenizer, tokenizer_hash="", vocabulary=len(tokenizer),
        renderer=ChatRenderer(tokenizer, template), parameters=Parameters(0, 0, []), config={}, shapes={}, warnings=[],
        folder=tokenizer_folder,
    )  # fmt: skip
    begin()
    checked = check_data(ctx, model)
    finish(ctx.snapshot.spec, checked, tokenizer, model.renderer, scratch / "prepared")


def theirs(rows: Path, tokenizer_folder: Path, scratch: Path) -> None:
    """datasets.map from the file to its Arrow files."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)

    def encode(batch: dict[str, Any]) -> Any:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return tokenizer(texts, add_special_tokens=False)

    begin()
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(scratch))
    data.map(encode, batched=True, num_proc=PROCESSES, remove_columns=data.column_names)


def begin() -> None:
    """What is imported counts from here on no more, on either side."""
    CLOCK.update(at=time.perf_counter(), cpu_seconds=time.process_time())


SIDES = {OURS: ours, THEIRS: theirs}


def run(side: str, rows: Path, tokenizer: Path) -> dict[str, float]:
    """One side's time and memory, in a process and a folder of its own."""
    with tempfile.TemporaryDirectory(dir=rows.parent) as scratch:
        ended = process_tree.run(
            [sys.executable, "-m", "bench.prepare_speed", "--side", side, rows, tokenizer, scratch],
            {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
        )
    told = json.loads(ended.output.splitlines()[-1])
    return {
        "seconds": told["seconds"],
        "cpu_seconds": ended.cpu_seconds - told["cpu_seconds_before"],
        "peak_rss_mib": ended.peak_rss_mib,
        "peak_pss_mib": ended.peak_pss_mib,
    }


def one_side(side: str, *paths: Path) -> None:
    """In the process of a run."""
    SIDES[side](*paths)
    seconds = time.perf_counter() - CLOCK["at"]
    print(json.dumps({"seconds": seconds, "cpu_seconds_before": CLOCK["cpu_seconds"]}))


def compare(rows: Path, tokenizer: Path, count: int, pairs: int) -> dict[str, Any]:
    """Both sides in alternating pairs."""
    runs: dict[str, list[dict[str, float]]] = {OURS: [], THEIRS: []}
    for pair in range(pairs):
        for side in alternating(pair, [OURS, THEIRS]):
            runs[side].append(run(side, rows, tokenizer))
            print(side, json.dumps({name: round(value, 1) for name, value in runs[side][-1].items()}), flush=True)

    def of(name: str) -> list[list[float]]:
        return [[found[name] for found in runs[side]] for side in (THEIRS, OURS)]

    found = {f"times as fast by {name}": ratio(*of(name)) for name in ("seconds", "cpu_seconds")}
    for name, value in found.items():
        print(f"{name}: {value}")
    return {
        "rows": count,
        "bytes": rows.stat().st_size,
        "processes": PROCESSES,
        "cpus": len(os.sched_getaffinity(0)),
        "runs": runs,
        **{name.replace(" ", "_"): asdict(value) for name, value in found.items()},
    }


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--side"]:
        one_side(sys.argv[2], *map(Path, sys.argv[3:]))
        return
    parser = figures.parser_of(__doc__)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--gigabytes", type=float, help="of data, for ours alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows, tokenizer = Path(folder) / "rows.jsonl", Path(folder) / "tokenizer"
        from transformers import AutoTokenizer

        from demo.model import GGUF, gguf_folder

        AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF).save_pretrained(tokenizer)
        if arguments.gigabytes:
            count = write_rows(rows, None, round(arguments.gigabytes * 1e9))
            result = {"rows": count, "bytes": rows.stat().st_size, "processes": PROCESSES, **run(OURS, rows, tokenizer)}
            print(json.dumps(result, indent=1))
        else:
            count = write_rows(rows, arguments.rows)
            result = compare(rows, tokenizer, count, arguments.pairs)
    figures.write(arguments.json, result)


if __name__ == "__main__":
    main()
