"""Our merge against PEFT's ``merge_and_unload`` and ``save_pretrained``: time, and peak anonymous memory beyond the imports.

    python -m bench.merge_pairs [--layers 20] [--hidden 4096] [--pairs 5] [--json FILE]

A synthetic Llama in bfloat16, a shard for each layer: with the defaults 8.1 GB in 20 shards. Both read it from the page cache, merge a LoRA
adapter of rank 16 on every linear layer and write shards of the same size; ours hashes what it writes, too. Each run is a process of
its own, in alternating pairs; the clock runs from the end of the imports to the last byte handed to the kernel. Needs 24 GiB of memory,
for PEFT, and 20 GB of disk.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the trainer sets it

import torch
from safetensors.torch import save_file

from bench import figures, sampled
from bench.pairs import Ratio, alternating, ratio
from finetune_trainer.publish.safetensors_stream import INDEX, Checkpoint

OURS, PEFT = "ours", "peft"
VOCABULARY = 400
COMPARED = "model.layers.0.mlp.down_proj.weight"


def write_model(folder: Path, layers: int, hidden: int) -> int:
    """Weights of the right sizes, and the bytes of the largest shard."""
    folder.mkdir()
    intermediate = hidden * 43 // 16
    settings: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "intermediate_size": intermediate,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 64, "num_key_value_heads": hidden // 64,
        "vocab_size": VOCABULARY, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "max_position_embeddings": 2048,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    shapes |= {f"mlp.{p}_proj": (intermediate, hidden) for p in ("gate", "up")}
    shapes["mlp.down_proj"] = (hidden, intermediate)
    torch.manual_seed(0)
    layer = {f"{name}.weight": (torch.randn(shape) / hidden**0.5).bfloat16() for name, shape in shapes.items()}
    layer |= {
        f"{name}.weight": torch.ones(hidden).bfloat16() for name in ("input_layernorm", "post_attention_layernorm")
    }
    ends = {
        "model.embed_tokens.weight": torch.randn(VOCABULARY, hidden).bfloat16(),
        "model.norm.weight": torch.ones(hidden).bfloat16(),
        "lm_head.weight": torch.randn(VOCABULARY, hidden).bfloat16(),
    }
    weight_map, sizes = {}, []
    for number in range(layers):
        tensors = {f"model.layers.{number}.{name}": tensor for name, tensor in layer.items()}
        tensors |= ends if number == layers - 1 else {}
        file = f"model-{number + 1:05d}-of-{layers:05d}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, file)
        sizes.append((folder / file).stat().st_size)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}))
    return max(sizes)


def merge_ours(model: Path, adapter: Path, merged: Path, _: int) -> None:
    """As the publish stage does it."""
    from finetune_trainer.publish.adapter import read_adapter
    from finetune_trainer.publish.merge import BaseWeights, merge

    started = time.monotonic()
    merge(BaseWeights(Checkpoint(model), None), read_adapter(adapter), torch.bfloat16, merged, lambda _: None)
    shutil.copyfile(model / INDEX, merged / INDEX)
    sampled.tell(started=started, ended=time.monotonic())


def merge_peft(model: Path, adapter: Path, merged: Path, shard_bytes: int) -> None:
    """As PEFT's documentation does it."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    started = time.monotonic()
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16, low_cpu_mem_usage=True)
    tuned = PeftModel.from_pretrained(base, adapter).merge_and_unload()
    tuned.save_pretrained(merged, max_shard_size=shard_bytes)
    sampled.tell(started=started, ended=time.monotonic())


MERGES = {OURS: merge_ours, PEFT: merge_peft}


def one(way: str, folder: Path, shard_bytes: int) -> tuple[dict[str, float], torch.Tensor]:
    """One merge in a process of its own, and a tensor that it wrote."""
    merged = folder / "merged"
    os.sync()  # what the run before has left to be written is not this one's
    run = sampled.run("bench.merge_pairs", [way, str(folder), str(shard_bytes)], folder / "log")
    written = Checkpoint(merged).read(COMPARED).float().clone()
    shutil.rmtree(merged)
    started, ended = run.told["started"], run.told["ended"]
    found = {
        "seconds": ended - started,
        "peak_mib": run.peak_mib(until=ended, since=started) - run.mib_at(started),
    }
    return found, written


def main() -> None:
    """Measure in alternating pairs, and print."""
    if sys.argv[1:2] and sys.argv[1] in MERGES:
        folder = Path(sys.argv[2])
        MERGES[sys.argv[1]](folder / "model", folder / "adapter", folder / "merged", int(sys.argv[3]))
        return
    parser = figures.parser_of(__doc__)
    parser.add_argument("--layers", type=int, default=20, help="each is a shard")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--pairs", type=int, default=5)
    arguments = parser.parse_args()
    from bench.merge_memory import write_adapter

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        shard = write_model(folder / "model", arguments.layers, arguments.hidden)
        write_adapter(Checkpoint(folder / "model"), folder / "adapter")
        adapter = sum(path.stat().st_size for path in (folder / "adapter").iterdir())
        pairs = []
        for number in range(arguments.pairs):
            runs = {way: one(way, folder, shard) for way in alternating(number, [OURS, PEFT])}
            torch.testing.assert_close(runs[OURS][1], runs[PEFT][1], rtol=2**-6, atol=1e-3)  # both round to bfloat16
            pairs.append({way: found for way, (found, _) in runs.items()})
            print(json.dumps(pairs[-1]), flush=True)

    def of(name: str) -> Ratio:
        return ratio([p[OURS][name] for p in pairs], [p[PEFT][name] for p in pairs])

    allowed = (2 * shard + adapter) / 2**20
    highest = max(p[OURS]["peak_mib"] for p in pairs)
    print(f"{arguments.layers} shards of at most {shard / 2**20:.0f} MiB, adapter {adapter / 2**20:.0f} MiB")
    print(f"ours: at most {highest:.0f} MiB; two shards and the adapter are {allowed:.0f} MiB")
    print(f"time, {OURS} / {PEFT}: {of('seconds')}")
    print(f"memory, {OURS} / {PEFT}: {of('peak_mib')}")
    found = {
        "shards": arguments.layers, "shard_mib": shard / 2**20, "adapter_mib": adapter / 2**20, "pairs": pairs,
        "seconds": asdict(of("seconds")), "peak_mib": asdict(of("peak_mib")),
    }  # fmt: skip
    figures.write(arguments.json, found)


if __name__ == "__main__":
    main()
