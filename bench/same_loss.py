"""The same job, its steps cut in every way: micro-batches, packing, checkpointing, ranks with whole copies or shards, an interruption.

    python -m bench.same_loss [--steps 24] [--json FILE]

A tiny Llama on a CPU, in float32, so that nothing but the order of sums differs; 30 rows of unlike length, 10 a step, LoRA on all linear layers without
dropout. Every run is a pod's processes, as in the cluster. Told is how far each run's training losses and its held-out loss are from those of one
process with one row at a time.
"""

from __future__ import annotations

import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench import figures
from tests.support.prepared import prepare_job
from tests.support.tiny_model import build_tiny_model
from tests.support.train_container import ENV_FLOAT32
from tests.support.train_process import kill_all, pod_of
from tests.trainer.conftest import S3, s3_server
from tests.trainer.test_train_resume import curve, result

ROWS, BATCH = 30, 10
FIRST = "1 row at a time"
TWO, THREE = {"compute": {"gpusPerNode": 2}}, {"compute": {"gpusPerNode": 3}}
Changes = dict[str, Any]


def micro(rows: int, **training: Any) -> Changes:
    """So many rows, or sequences, at a time."""
    return {"training": {"microBatchSequences": rows, **training}}


RUNS: dict[str, Changes] = {
    FIRST: micro(1),
    "2": micro(2),
    "5": micro(5),
    "10": micro(10),
    "1, packed": micro(1, packing=True),
    "2, packed": micro(2, packing=True),
    "5, gradient checkpointing": micro(5, gradientCheckpointing=True),
    "2 ranks": {**micro(5), **TWO},
    "3 ranks, which share 10 rows unevenly": {**micro(2), **THREE},
    "3 ranks, packed": {**micro(2, packing=True), **THREE},
    "2 ranks, FSDP": {**micro(5, parallelism="FSDP"), **TWO},
    "2 ranks, FSDP, packed": {**micro(1, packing=True, parallelism="FSDP"), **TWO},
    "CPU offload": micro(5, cpuOffload="Always"),
    "5, stopped in the middle and resumed": micro(5),
}


def run(
    s3: S3, model: Path, folder: Path, steps: int, changes: Changes, interrupted: bool
) -> tuple[list[float], float]:
    """Training losses, and the held-out loss at the end."""
    training = {"length": {"steps": steps}, "globalBatchSequences": BATCH, **changes["training"]}
    job = prepare_job(s3, folder, model, train_rows=ROWS, **{**changes, "training": training})
    pod = pod_of(job, **{ENV_FLOAT32: "1"}).start()
    if interrupted:
        pod.until_step(steps // 2)
        pod.process.send_signal(signal.SIGTERM)
        pod.wait()
        pod = pod_of(job, **{ENV_FLOAT32: "1"}).start()
    if pod.wait() != 0:
        raise SystemExit(pod.log)
    return curve(job), result(job).metrics.held_out_loss


def main() -> None:
    """Run them all and print the differences."""
    parser = figures.parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as name, ExitStack() as ended:
        ended.callback(kill_all)
        folder = Path(name)
        with s3_server(folder / "s3") as s3:
            model = build_tiny_model(folder / "model")
            yardstick: tuple[list[float], float] | None = None
            for number, (label, changes) in enumerate(RUNS.items()):
                losses, held_out = run(s3, model, folder / f"job-{number}", options.steps, changes, "resumed" in label)
                first, first_held_out = yardstick = yardstick or (losses, held_out)
                if len(losses) != len(first):
                    raise SystemExit(f"{label}: {len(losses)} steps instead of {len(first)}")
                found[label] = {
                    "first": losses[0],
                    "last": losses[-1],
                    "heldOut": held_out,
                    "most": max(abs(a - b) / b for a, b in zip(losses, first, strict=True)),
                    "heldOutDifference": abs(held_out - first_held_out) / first_held_out,
                }
                line = found[label]
                print(
                    f"| {label} | {line['first']:.6f} | {line['last']:.6f} | {line['heldOut']:.6f} | {line['most']:.1e} | "
                    f"{line['heldOutDifference']:.1e} |",
                    flush=True,
                )
    figures.write(options.json, {"steps": options.steps, "runs": found})


if __name__ == "__main__":
    main()
