"""The adapter folder: adapter, tokenizer, chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file

from finetune_api.failures import GPU_PATIENCE_SECONDS
from finetune_api.results import ADAPTER_DIR, METRICS_FILE, FileRecord
from finetune_trainer.context import StageContext
from finetune_trainer.lora_files import CONFIG, WEIGHTS
from finetune_trainer.s3 import S3Store
from finetune_trainer.train.offset_lora import is_offset, plain_lora
from finetune_trainer.waiting import wait_until_available


def save_adapter(model: PeftModel, tokenizer: Any, folder: Path) -> None:
    """Write what peft, transformers and vLLM load, into ``folder``."""
    config = model.peft_config[model.active_adapter]
    # Otherwise peft asks the Hub for the base's vocabulary size, to find out whether embeddings were resized.
    if is_offset(model):
        config, tensors = plain_lora(config, get_peft_model_state_dict(model, save_embedding_layers=False))
        config.inference_mode = True
        config.save_pretrained(folder)
        on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(on_host, folder / WEIGHTS, metadata={"format": "pt"})
    else:
        model.save_pretrained(folder, safe_serialization=True, save_embedding_layers=False)
    # peft writes its sets in the order of this process's string hashes.
    path = folder / CONFIG
    written = json.loads(path.read_text())
    ordered = {k: sorted(v) if isinstance(getattr(config, k, None), set) else v for k, v in written.items()}
    path.write_text(json.dumps(ordered, indent=2, sort_keys=True))
    tokenizer.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's empty card; publish writes the real one


def upload_adapter(ctx: StageContext, folder: Path, output: S3Store) -> list[FileRecord]:
    """To ``adapter/``."""
    return upload_folder(ctx, folder, output, ADAPTER_DIR)


def upload_folder(ctx: StageContext, folder: Path, store: S3Store, prefix: str) -> list[FileRecord]:
    """Replace what an earlier execution may have left below ``prefix``."""
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())

    wait_until_available(ctx, lambda: store.clear(prefix), limit_seconds=GPU_PATIENCE_SECONDS)
    return wait_until_available(
        ctx,
        lambda: store.upload_dir(folder, prefix, ctx.reporter.transfer("upload", total)),
        limit_seconds=GPU_PATIENCE_SECONDS,
    )


def upload_metrics(ctx: StageContext, lines: list[dict[str, Any]], output: S3Store) -> FileRecord:
    """One JSON object a line: every step, every evaluation."""
    data = "".join(json.dumps(line) + "\n" for line in lines).encode()
    return wait_until_available(ctx, lambda: output.put_bytes(METRICS_FILE, data), limit_seconds=GPU_PATIENCE_SECONDS)
