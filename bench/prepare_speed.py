"""How fast rows are checked and tokenised, against ``datasets.map`` that renders and tokenises the same rows and checks nothing.

    .venv/bin/python bench/prepare_speed.py [--rows 40000] [--pairs 6] [--json FILE]

Both go from a file of JSON lines to tokens on disk, with SmolLM2's tokenizer and chat template and two processes. Ours is the prepare
stage's own code: every check, labels, near duplicates, the split and the prepared files. Theirs is ``load_dataset`` and ``map(batched=True,
num_proc=2)`` with ``apply_chat_template`` and one call of the tokenizer a batch: no labels, no checks. The rows are conversations of
sentences from Python's own documentation (``pydoc_data``). Each run is a process of its own; its clock starts after the imports and
includes its worker processes' start. Pairs alternate in one run; the bound is the mean log ratio less t · s / √n.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pydoc_data.topics
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

PROCESSES = 2
if __name__ == "__mp_main__":  # a worker of ours: the prepare image has no torch
    sys.modules["torch"] = None  # type: ignore[assignment]
STUDENT_T = {1: 6.314, 2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895, 8: 1.860, 9: 1.833}
"""95 % quantile, one-sided, by degrees of freedom."""


def write_rows(path: Path, count: int) -> None:
    """Conversations of one or two questions with answers, about a thousand characters each."""
    words = re.sub(r"\s+", " ", " ".join(pydoc_data.topics.topics.values()))
    sentences = [s for s in re.split(r"(?<=[.:]) ", words) if 20 < len(s) < 400]
    draw = random.Random(7)
    with path.open("w") as file:
        for _ in range(count):
            turns = []
            for _ in range(draw.choice((1, 1, 2))):
                turns.append({"role": "user", "content": " ".join(draw.choices(sentences, k=draw.randint(1, 3)))})
                turns.append({"role": "assistant", "content": " ".join(draw.choices(sentences, k=draw.randint(2, 8)))})
            file.write(json.dumps({"messages": turns}) + "\n")


def ours(rows: Path, tokenizer_folder: Path, scratch: Path) -> float:
    """Seconds of the prepare stage from the file to the prepared rows."""
    from finetune_trainer.prepare.chat import ChatRenderer, chat_template, load_tokenizer
    from finetune_trainer.prepare.check import check_data
    from finetune_trainer.prepare.finish import finish
    from finetune_trainer.prepare.model import BaseModel
    from finetune_trainer.prepare.shapes import Parameters
    from tests.support.trainer_run import Pod

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
    begin = time.perf_counter()
    checked = check_data(ctx, model)
    finish(ctx.snapshot.spec, checked, tokenizer, model.renderer, scratch / "prepared")
    return time.perf_counter() - begin


def theirs(rows: Path, tokenizer_folder: Path, scratch: Path) -> float:
    """Seconds of datasets.map from the file to its Arrow files."""
    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)

    def encode(batch: dict[str, Any]) -> Any:
        texts = tokenizer.apply_chat_template(batch["messages"], tokenize=False)
        return tokenizer(texts, add_special_tokens=False)

    begin = time.perf_counter()
    data = load_dataset("json", data_files=str(rows), split="train", cache_dir=str(scratch))
    data.map(encode, batched=True, num_proc=PROCESSES, remove_columns=data.column_names)
    return time.perf_counter() - begin


def run(side: str, rows: Path, tokenizer: Path) -> dict[str, float]:
    """Seconds and peak memory of one side, in a process and a folder of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        done = subprocess.run(
            [sys.executable, __file__, "--side", side, rows, tokenizer, scratch],
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"},
        )
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return result


def highest_mib(pid: int | str) -> int:
    """Highest resident memory of a process, with what it shares; 0 for one that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM:")), 0)


def watch_workers(highest: list[int]) -> None:
    """Keep the highest memory of any child in ``highest[0]``, while this process lives."""
    while True:
        for children in Path("/proc/self/task").glob("*/children"):
            for pid in children.read_text().split():
                highest[0] = max(highest[0], highest_mib(pid))
        time.sleep(0.2)


def summary(ratios: list[float]) -> dict[str, float]:
    """Of how many times as fast ours is: geometric mean, lowest, highest, and the lower 95 % bound of the mean."""
    logs = [math.log(r) for r in ratios]
    mean = statistics.fmean(logs)
    result = {"mean": math.exp(mean), "lowest": min(ratios), "highest": max(ratios)}
    if len(logs) > 1:
        t = STUDENT_T.get(len(logs) - 1, 1.833)
        result["lower_95"] = math.exp(mean - t * statistics.stdev(logs) / math.sqrt(len(logs)))
    return {name: round(value, 3) for name, value in result.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--side", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side, *paths = arguments.side
        if side == "ours":
            sys.modules["torch"] = None  # type: ignore[assignment]
        workers = [0]
        threading.Thread(target=watch_workers, args=(workers,), daemon=True).start()
        seconds = {"ours": ours, "theirs": theirs}[side](*map(Path, paths))
        print(json.dumps({"seconds": seconds, "peak_mib": highest_mib("self"), "worker_peak_mib": workers[0]}))
        return
    with tempfile.TemporaryDirectory() as folder:
        rows, tokenizer = Path(folder) / "rows.jsonl", Path(folder) / "tokenizer"
        write_rows(rows, arguments.rows)
        from transformers import AutoTokenizer

        from demo.model import GGUF, gguf_folder

        AutoTokenizer.from_pretrained(gguf_folder(), gguf_file=GGUF).save_pretrained(tokenizer)
        runs: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        for pair in range(arguments.pairs):
            for side in ("ours", "theirs") if pair % 2 == 0 else ("theirs", "ours"):
                runs[side].append(run(side, rows, tokenizer))
        result = {
            "rows": arguments.rows,
            "bytes": rows.stat().st_size,
            "processes": PROCESSES,
            "cpus": len(os.sched_getaffinity(0)),
            "rows_per_second": {k: [round(arguments.rows / r["seconds"], 1) for r in v] for k, v in runs.items()},
            "peak_mib": {k: max(r["peak_mib"] for r in v) for k, v in runs.items()},
            "worker_peak_mib": {k: max(r["worker_peak_mib"] for r in v) for k, v in runs.items()},
            "ratio": summary([b["seconds"] / a["seconds"] for a, b in zip(runs["ours"], runs["theirs"], strict=True)]),
        }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
