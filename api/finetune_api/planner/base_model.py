"""Which models can be fine-tuned at all, by their config.json."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")


def why_not_tunable(config: Mapping[str, Any], uri: str) -> str:
    """What keeps a model from being fine-tuned; empty if nothing does: it writes text, and its weights are numbers."""
    architectures = config.get("architectures") or []
    if architectures and not any(CAUSAL.search(str(a)) for a in architectures):
        return f"{uri} is a {', '.join(map(str, architectures))}; expected a causal language model (…ForCausalLM)"
    if quantization := config.get("quantization_config"):
        method = (
            quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else "unknown method"
        )
        return f"{uri} is quantized already ({method}): name the original model; QLoRA quantizes it itself"
    return ""
