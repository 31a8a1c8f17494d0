"""Fine-tuning as trl's users write it: ``python -m bench.trl_train JOB.json``. Prints what bench/training_speed.py wants to know.

trl as its documentation recommends it: dynamic padding (or packing, which is its padding-free mode), its own loss, no logits of
prompts. The rows come tokenised and in their order, and the trained model's held-out loss is measured as ours is.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig, SFTTrainer

from bench import sampled


class Clock(TrainerCallback):  # type: ignore[misc]
    """When each optimizer step was made."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.cpu: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        """One more."""
        self.ends.append(time.monotonic())
        self.cpu.append(time.process_time())


def main() -> None:
    """All of it."""
    job = json.loads(Path(sys.argv[1]).read_text())
    data = load_dataset("parquet", data_files={"train": job["train"]}, cache_dir=job["folder"] + "/datasets")
    clock = Clock()
    torch.manual_seed(job["seed"])
    trainer = SFTTrainer(
        model=load_base(job),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=data["train"],
        peft_config=LoraConfig(
            r=job["rank"],
            lora_alpha=2 * job["rank"],
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=job["folder"],
            num_train_epochs=1,
            per_device_train_batch_size=job["micro_batch"],
            gradient_accumulation_steps=job["accumulation"],
            learning_rate=job["learning_rate"],
            lr_scheduler_type="cosine",
            warmup_steps=job["warmup_steps"],
            weight_decay=0.0,
            max_length=job["max_tokens"],
            packing=job["packing"],
            completion_only_loss=True,
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            optim="adamw_torch_fused",
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=job["dtype"] == "bfloat16",
            seed=job["seed"],
            disable_tqdm=True,
        ),
    )
    if job["float32_adapters"]:  # before the optimizer is made
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()
    trainer.save_model(job["folder"] + "/adapter")
    ended = time.monotonic()
    lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
    size = job["micro_batch"] * job["accumulation"]
    found = {
        "step_ends": clock.ends,
        "step_cpu": clock.cpu,
        "step_tokens": [sum(lengths[i : i + size]) for i in range(0, len(lengths), size)],
        "ended": ended,
        "held_out_loss": held_out_loss(job),
    }
    sampled.tell(**found)


def load_base(job: dict[str, Any]) -> Any:
    """The base, in 4 bit for QLoRA."""
    dtype = getattr(torch, job["dtype"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    return AutoModelForCausalLM.from_pretrained(
        job["model"], dtype=dtype, quantization_config=quantization if job["method"] == "QLoRA" else None
    )


def held_out_loss(job: dict[str, Any]) -> float:
    """Σ NLL / Σ learned tokens of the saved adapter on a fresh base, by the train stage's own measure."""
    from finetune_api.spec import Training
    from finetune_trainer.train.device import pick_compute
    from finetune_trainer.train.evaluate import held_out_loss as measure
    from finetune_trainer.train.rows import read_rows

    tuned = PeftModel.from_pretrained(load_base(job), job["folder"] + "/adapter").get_base_model()
    return measure(tuned, read_rows(Path(job["held_out"])), 0, pick_compute(Training(use_cpu=True))).loss


if __name__ == "__main__":
    main()
