"""A run's CPU seconds and memory are those of all its processes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bench import process_tree

BUSY = """
import time
held = bytearray(b"x") * (64 << 20)
while time.process_time() < 1:
    pass
"""


def test_the_time_and_memory_of_a_process_below_count() -> None:
    parent = f"import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', {BUSY!r}]); child.wait(); print('done')"
    found = process_tree.run([sys.executable, "-c", parent], os.environ)
    assert found.output == "done\n"
    assert found.cpu_seconds > 0.95
    assert found.peak_rss_mib > found.peak_pss_mib > 64


def test_a_run_that_failed_is_none() -> None:
    with pytest.raises(subprocess.CalledProcessError):
        process_tree.run([sys.executable, "-c", "raise SystemExit(3)"], os.environ)
