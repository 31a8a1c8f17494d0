"""LoRA adapters of the tiny model, made by peft, and the combine stage's surroundings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from finetune_api import names
from finetune_api.combination import CombinationSnapshot
from finetune_api.snapshot import JobIdentity
from finetune_api.spec import AdapterCombinationSpec
from finetune_trainer.context import CombineContext, load_combine_context

BASE = "org/tiny"
UID = "0a1b2c3d-0000-0000-0000-000000000000"


def make_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """One with random weights; it names its base as the Hub does."""
    config = LoraConfig(
        **{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "up_proj"], **settings}
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05 if "lora_" in name else 0.5)
    config.base_model_name_or_path = BASE
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def combination_snapshot(spec: dict[str, Any], name: str = "mix") -> CombinationSnapshot:
    """What the operator would put into the pod."""
    job = JobIdentity(name=name, namespace="team", uid=UID, generation=1)
    return CombinationSnapshot(job=job, spec=AdapterCombinationSpec.model_validate(spec))


def combine_context(root: Path, spec: dict[str, Any]) -> CombineContext:
    """A pod's surroundings below ``root``."""
    return load_combine_context(
        secrets_dir=root / "secrets",
        pvc_dir=root / "pvc",
        work_dir=root / "work",
        environ={names.ENV_POD_UID: "pod-1", names.ENV_SNAPSHOT: combination_snapshot(spec).canonical_json()},
    )
