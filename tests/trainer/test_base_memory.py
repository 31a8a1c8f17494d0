"""What a container's memory cgroup tells, in the files of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetune_trainer.memory import kills, peak_bytes


@pytest.mark.parametrize("name", ["memory.peak", "memory/memory.max_usage_in_bytes"])
def test_the_peak_is_what_the_kernel_counted(tmp_path: Path, name: str) -> None:
    assert peak_bytes(tmp_path) is None
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("471859200\n")
    assert peak_bytes(tmp_path) == 471_859_200


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("memory.events", "low 0\nhigh 0\nmax 12\noom 1\noom_kill 3\noom_group_kill 0\n"),
        ("memory/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 3\n"),
    ],
)
def test_kills_are_those_for_want_of_memory(tmp_path: Path, name: str, text: str) -> None:
    assert kills(tmp_path) == 0
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text(text)
    assert kills(tmp_path) == 3
