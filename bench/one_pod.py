"""The usual way, in one pod that holds its GPU from start to end: download the model, tokenise, train, evaluate, merge, upload.

Runs in the trainer image (bench/gpu_time.py mounts it); what it does is what trl's own examples do. Prints one line of JSON with
the seconds of each part.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

STARTED = time.monotonic()

import boto3  # noqa: E402
from datasets import load_dataset  # noqa: E402
from huggingface_hub import hf_hub_download, model_info  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback  # noqa: E402
from trl import SFTConfig, SFTTrainer  # noqa: E402

WORK = Path("/work")


class Clock(TrainerCallback):  # type: ignore[misc]
    """First to last optimizer step."""

    first = last = 0.0

    def on_step_begin(self, *_: object, **__: object) -> None:
        """A step begins."""
        self.first = self.first or time.monotonic()

    def on_step_end(self, *_: object, **__: object) -> None:
        """It ends."""
        self.last = time.monotonic()


def main() -> None:
    """All of it."""
    seconds = {"imports": time.monotonic() - STARTED}
    asked = json.loads(os.environ["JOB"])

    def timed(name: str, since: float) -> None:
        seconds[name] = time.monotonic() - since

    since = time.monotonic()
    model_folder = WORK / "model"
    for file in model_info(asked["model"]).siblings or []:
        hf_hub_download(asked["model"], file.rfilename, local_dir=model_folder)
    timed("download", since)

    since = time.monotonic()
    s3 = boto3.client("s3")
    files = {}
    for split in ("train", "held_out"):
        files[split] = str(WORK / f"{split}.jsonl")
        s3.download_file(asked["bucket"], asked[split], files[split])
    data = load_dataset("json", data_files=files)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=asked["dtype"])
    clock = Clock()
    batch = asked["batch"]
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=data["train"],
        eval_dataset=data["held_out"],
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=str(WORK / "trained"),
            max_steps=asked["steps"],
            per_device_train_batch_size=batch,
            per_device_eval_batch_size=batch,
            learning_rate=2e-4,
            lr_scheduler_type="cosine",
            warmup_steps=0.03,
            max_length=512,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=asked["dtype"] == "bfloat16",
            seed=42,
        ),
    )
    timed("tokenise and load", since)

    trainer.train()
    seconds["training"] = clock.last - clock.first

    since = time.monotonic()
    loss = trainer.evaluate()["eval_loss"]
    timed("evaluate", since)

    since = time.monotonic()
    trainer.model.save_pretrained(WORK / "adapter")
    merged = trainer.model.merge_and_unload()
    merged.save_pretrained(WORK / "merged")
    tokenizer.save_pretrained(WORK / "merged")
    timed("merge", since)

    since = time.monotonic()
    for folder in ("adapter", "merged"):
        for path in sorted((WORK / folder).iterdir()):
            s3.upload_file(str(path), asked["bucket"], f"one-pod/{folder}/{path.name}")
    timed("upload", since)
    print("ONE_POD " + json.dumps({"seconds": seconds, "held_out_loss": loss}), flush=True)


if __name__ == "__main__":
    main()
