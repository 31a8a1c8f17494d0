"""`make demo` and the README's second job: the very commands that a user runs."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from demo.target import NAMESPACE, ROOT
from tests.e2e.stack import Stack, is_true

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]


def test_the_demo_trains_a_real_model_and_held_out_perplexity_falls_by_a_fifth(stack: Stack) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "demo", "up"], cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    job = stack.target.get("ftj", "quickstart", "-n", NAMESPACE)
    assert is_true(job, "Complete")
    metrics = job["status"]["metrics"]
    assert metrics["perplexity"] <= 0.8 * metrics["perplexityBase"]
    for words in (
        "Artifacts:",
        "manifest.json",
        "Held-out loss on answer tokens",
        "expected:",
        "tuned:",
        "Time per step",
    ):
        assert words in done.stdout
    assert done.stdout.count("    tuned: ") == 3, "the first three held-out prompts"


def test_the_second_job_of_the_readme_runs_as_written(stack: Stack) -> None:
    section = (ROOT / "README.md").read_text().split("### A second job")[1]
    script = re.search(r"```\n(.*?)```", section, re.DOTALL)
    assert script is not None
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script[1]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    try:
        assert is_true(stack.target.get("ftj", "second", "-n", NAMESPACE), "Complete"), done.stdout[-4000:]
    finally:
        stack.target.kubectl("delete", "ftj", "second", "-n", NAMESPACE, "--wait=false")
