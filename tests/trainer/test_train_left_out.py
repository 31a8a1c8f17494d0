"""What a training process does not import: a GPU is held while it does."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from finetune_trainer.train.left_out import unused_libraries
from tests.support.trainer_run import merged, snapshot_of

SPEC: dict[str, Any] = {
    "model": {"uri": "hf://acme/base"},
    "data": {"train": [{"uri": "s3://data/train.jsonl"}]},
    "method": {"type": "LoRA"},
    "output": {"uri": "s3://models/out"},
}


@pytest.mark.parametrize(
    ("changes", "unused"),
    [
        ({}, ["datasets", "bitsandbytes"]),
        ({"method": {"type": "QLoRA"}}, ["datasets"]),
        ({"method": {"type": "Auto"}}, ["datasets"]),
        ({"training": {"optimizer": {"name": "adamw_8bit"}}}, ["datasets"]),
        ({"training": {"optimizer": {"name": "adafactor"}}}, ["datasets", "bitsandbytes"]),
        (
            {"training": {"optimizer": {"name": "schedule_free_sgd"}, "scheduler": "Constant"}},
            ["datasets", "bitsandbytes"],
        ),
        ({"model": {"trustRemoteCode": True}}, []),
    ],
    ids=lambda value: str(value),
)
def test_a_run_leaves_out_what_neither_its_spec_nor_the_plan_can_need(
    changes: dict[str, Any], unused: list[str]
) -> None:
    assert unused_libraries(snapshot_of(merged(SPEC, changes))) == unused


def test_the_train_stage_imports_without_what_a_lora_run_leaves_out() -> None:
    script = (
        "import sys\n"
        "from finetune_trainer.train.left_out import leave_out\n"
        "leave_out(['datasets', 'bitsandbytes'])\n"
        "import finetune_trainer.train.run\n"
        "print(sorted({'pandas', 'datasets', 'bitsandbytes', 'trl'} & {n for n, m in sys.modules.items() if m}))"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == "[]"


def test_what_is_imported_already_stays() -> None:
    script = (
        "import sys, json\n"
        "from finetune_trainer.train.left_out import leave_out\n"
        "leave_out(['json'])\n"
        "assert sys.modules['json'] is json"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
