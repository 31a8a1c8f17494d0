"""A node without power, on a cluster of its own: a second node on the cluster of the other tests would stay with them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable

from demo.target import ROOT
from finetune_cluster.down import down
from tests.chaos.parts import Figures
from tests.e2e.test_node_lost import TOLD, WITH_SECOND_NODE

CLUSTER = "finetune-pair"
PASSED = re.compile(r"\b1 passed\b")


def node_lost(figures: Figures, say: Callable[[str], None]) -> bool:
    """Run the test of it. It was run if it says so: one that is skipped ends well, too."""
    began = time.monotonic()
    environment = {**os.environ, "CLUSTER_NAME": CLUSTER, "NODES": "1", WITH_SECOND_NODE: "yes"}
    command = [sys.executable, "-m", "pytest", "tests/e2e/test_node_lost.py", "-p", "no:cacheprovider", "-q", "-s"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    finally:
        down(CLUSTER)
    say(done.stdout)
    told = TOLD.search(done.stdout)
    figures |= {
        "told_after_seconds": int(told.group(1)) if told else None,
        "training_after_taint_seconds": int(told.group(2)) if told else None,
        "seconds": round(time.monotonic() - began),
    }
    return done.returncode == 0 and PASSED.search(done.stdout) is not None
