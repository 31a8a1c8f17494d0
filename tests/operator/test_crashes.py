"""An operator that dies at any point is as good as one that does not."""

from __future__ import annotations

import subprocess
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from finetune_api.names import Stage
from finetune_cluster.light import LightCluster
from finetune_cluster.steps import Pod, Step, run_forever
from tests.operator.harness import Bench, Tls, finetunejobs_of, is_true, stage_of, succeed_stage
from tests.operator.manifests import finetunejob
from tests.operator.remains import bench_in, remains

pytestmark = pytest.mark.light

MOST_WRITES = 40
AT_ONCE = 3
URL: dict[str, Any] = {"FINETUNE_PROGRESS_URL": "https://operator.test:8443"}
"""Otherwise a random port of the harness would tell the Jobs of two processes apart."""


def script(pod: Pod) -> list[Step]:
    if stage_of(pod) is Stage.TRAIN and pod["metadata"]["labels"]["finetune.dev/job-name"] == "endless":
        return run_forever()
    return succeed_stage(pod, 0.2)


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "deadline", "writes"),
    [
        # The snapshot, three Jobs, the first and the last status, and the Events Prepared, Started, Trained, Succeeded.
        ("story", None, 1 + 3 + 2 + 4),
        # The snapshot, two Jobs, the first and the last status, a deletion, and the Events Prepared, Started, Failed.
        ("endless", 2, 1 + 2 + 2 + 1 + 3),
    ],
)
def test_killed_after_any_of_its_writes_it_ends_in_the_same_objects(
    cluster: LightCluster, tls: Tls, tmp_path: Path, name: str, deadline: int | None, writes: int
) -> None:
    builder = finetunejob(name) if deadline is None else finetunejob(name).deadline(deadline)
    manifest = builder.build()
    enough = threading.Event()

    def run(crash_after: int) -> dict[str, Any] | None:
        """The remains of a run with one crash; of an undisturbed one for 0; None if there were not so many writes."""
        namespace = f"crash-{name}-{crash_after}"
        if enough.is_set():
            return None
        with ExitStack() as stack:
            bench = stack.enter_context(bench_in(cluster, tls, tmp_path / namespace, namespace))
            stack.enter_context(bench.script(script))
            module = "tests.operator.crashing_operator" if crash_after else "finetune_operator"
            operator = bench.start_operator(wait=False, module=module, CRASH_AFTER_WRITES=str(crash_after), **URL)
            bench.apply({**manifest, "metadata": dict(manifest["metadata"])})
            if crash_after:
                # A write that every story has is waited for, however slow the machine is.
                died = died_within(120, operator) if crash_after <= writes else wait_for_end(bench, operator, name)
                if not died:
                    enough.set()
                    return None
                bench.start_operator(**URL)
            bench.until_finished(name, 120)
            selector = {"labelSelector": "finetune.dev/stage=train"}
            if deadline is not None:
                bench.until_gone(f"/apis/batch/v1/namespaces/{namespace}/jobs", query=selector)
            return remains(bench, name)

    undisturbed = run(0)
    assert undisturbed is not None
    with ThreadPoolExecutor(AT_ONCE) as pool:
        results = dict(zip(range(1, MOST_WRITES), pool.map(run, range(1, MOST_WRITES)), strict=False))
    crashes = {n: r for n, r in results.items() if r is not None}
    assert set(crashes) >= set(range(1, writes + 1)), "a crash after every write that there must be"
    for number, left in crashes.items():
        assert left == undisturbed, f"killed after write {number}"


def died_within(seconds: int, operator: Any) -> bool:
    try:
        operator.process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def wait_for_end(bench: Bench, operator: Any, name: str) -> bool:
    """Whether the operator died before the job's story was over (its Events included)."""
    finished = 0
    for _ in bench.api.watch(finetunejobs_of(bench.namespace), 120, {"timeoutSeconds": "1"}):
        if operator.process.poll() is not None:
            return True
        if is_true(bench.job(name), "Finished"):
            finished += 1
        if finished > 3:
            break
    return died_within(5, operator)
