"""A job killed at random on the real cluster must leave the same adapter, byte by byte, as one that was left alone.

    python -m tests.chaos [--seed S] [--json FILE] [--only PART …]

The parts, in this order; the figures of each are in the file when it ends, also where another one fails:
    killed-job            the two runs and their comparison
    cluster-fault-points  faults before the real cluster's API server, at sampled requests and watch events of a job's life
    node-lost             a node of a second cluster loses its power while it trains
    checkpoint-cost       training with checkpoints every few steps beside training without
    histories             random histories of the planner
    fault-points          a fault at every request and watch event of a job's life, on a light cluster
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median

from demo.target import ROOT
from tests.chaos.api_faults import ClusterFaults
from tests.chaos.histories import run_histories
from tests.chaos.node_lost import node_lost
from tests.chaos.parts import Figures, Part, counts, run_parts, struck_well
from tests.chaos.run import INTERVAL, Ended, Struck, as_json, data, line, live, training_spec
from tests.chaos.schedule import INTERRUPTING, Kind, schedule
from tests.e2e.stack import new_space, whole_stack
from tests.operator.fault_sweep import Outcome

WHILE_TRAINING = 6
"""So many of ten kills must fall while training goes on past its first interval checkpoint."""


def say(text: str) -> None:
    """At once, also into a file."""
    print(text, flush=True)


def killed_job(figures: Figures, seed: int, steps: int, kills: int) -> bool:
    """The two runs and their comparison."""
    planned = schedule(seed, steps, kills)
    say("planned: " + ", ".join(f"{k.kind} at {k.at}" for k in planned))
    figures |= {"steps": steps, "checkpoint_interval_steps": INTERVAL, "kills": []}

    def tell(struck: Struck) -> None:
        figures["kills"].append(as_json(struck))
        say(line(struck))

    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        stack = opened.enter_context(whole_stack(folder))
        space = opened.enter_context(new_space(stack.target, stack.bucket))
        spec = training_spec(data(space), steps)
        undisturbed = live(space, "undisturbed", spec)
        figures["seconds_undisturbed"] = round(undisturbed.seconds, 1)
        say(f"undisturbed: {undisturbed.seconds:.0f} s")
        killed = live(space, "killed", spec, planned, tell)
    figures |= compared(undisturbed, killed)
    say("\n" + table(figures) + "\n")
    wanted = min(WHILE_TRAINING, sum(isinstance(k.at, int) for k in planned))
    enough = figures["kills_while_training_past_the_first_interval_checkpoint"] >= wanted
    return enough and all(figures["same_bytes"].values())


def compared(undisturbed: Ended, killed: Ended) -> Figures:
    """What the two runs say together."""
    struck = killed.struck
    status = killed.job["status"]
    times = {
        str(kind): [round(s.seconds_to_training, 1) for s in struck if s.kind is kind and s.seconds_to_training]
        for kind in Kind
    }
    blocked = undisturbed.blocked_seconds
    return {
        "same_bytes": {name: undisturbed.files[name] == killed.files[name] for name in undisturbed.files},
        "seconds_with_kills": round(killed.seconds, 1),
        "kills_while_training_past_the_first_interval_checkpoint": sum(s.while_training for s in struck),
        "steps_recomputed": sum(s.steps_recomputed for s in struck),
        "steps_recomputed_per_interrupting_kill": [s.steps_recomputed for s in struck if s.kind in INTERRUPTING and s.while_training],
        "seconds_to_training": {kind: found for kind, found in times.items() if found},
        "apiserver_ready_seconds": [s.seconds_to_answer for s in struck if s.kind is Kind.API_SERVER],
        "apiserver_status_seconds": [s.seconds_to_status for s in struck if s.kind is Kind.API_SERVER],
        "checkpoints": len(blocked),
        "checkpoint_blocked_seconds": {"median": median(blocked), "max": max(blocked), "sum": round(sum(blocked), 3)},
        "attempts": [{k: a.get(k) for k in ("stage", "outcome", "reason", "resumedFromStep", "lastStep")} for a in status["attempts"]],
        "recoveries": [r["reason"] for r in status.get("recoveries", [])],
        "resumed_from_steps": killed.result["resumedFromSteps"],
    }  # fmt: skip


def table(figures: Figures) -> str:
    """For people."""
    lines = [f"{'KILLED':<24} {'PHASE':<11} {'STEP':>5} {'CHECKPOINT':>10} {'RECOMPUTED':>10} {'TRAINING AFTER':>14} {'ANSWERS AFTER':>13}"]  # fmt: skip
    for kill in figures["kills"]:
        after, answers = (f"{s:.1f} s" if s is not None else "-" for s in (kill["seconds_to_training"], kill["seconds_to_answer"]))  # fmt: skip
        lines.append(f"{kill['kind']:<24} {kill['phase']:<11} {kill['step']:>5} {kill['checkpoint_step']:>10} {kill['steps_recomputed']:>10} {after:>14} {answers:>13}")  # fmt: skip
    blocked = figures["checkpoint_blocked_seconds"]
    lines += [
        "",
        f"{figures['kills_while_training_past_the_first_interval_checkpoint']} of {len(figures['kills'])} kills while training past the first interval checkpoint",
        f"{figures['steps_recomputed']} of {figures['steps']} steps computed again",
        f"{figures['seconds_undisturbed']:.0f} s undisturbed, {figures['seconds_with_kills']:.0f} s with kills",
        f"{figures['checkpoints']} checkpoints held the step loop up for {1000 * blocked['median']:.1f} ms each (median; longest {1000 * blocked['max']:.1f} ms)",
        *(f"{name}: {'the same bytes' if same else 'DIFFERENT'}" for name, same in figures["same_bytes"].items()),
    ]  # fmt: skip
    return "\n".join(lines)


def cluster_fault_points(figures: Figures, seed: int, count: int) -> bool:
    """Sampled fault points before the real cluster's API server."""
    began = time.monotonic()
    figures |= {"points": [], "reached": 0, "passed": 0}

    def tell(outcome: Outcome) -> None:
        figures["points"].append({"fault": str(outcome.point), "hit": outcome.hit, "problems": outcome.problems})
        figures["reached"] += bool(outcome.hit)
        figures["passed"] += outcome.passed
        figures["seconds"] = round(time.monotonic() - began)
        say(f"{outcome.point}: {outcome.hit or 'not reached'}, {outcome.problems or 'no difference'}")

    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        stack = opened.enter_context(whole_stack(folder))
        ClusterFaults(stack, folder).run(count, seed, tell)
    failed = sum(bool(point["problems"]) for point in figures["points"])
    return struck_well(len(figures["points"]), figures["passed"], failed)


def checkpoint_cost(figures: Figures, pairs: int) -> bool:
    """Training with many checkpoints beside training with few."""
    from tests.chaos.checkpoint_cost import measure  # it imports torch: only who trains here waits for that

    return measure(figures, pairs, say)


def histories(figures: Figures, seed: int, count: int) -> bool:
    """Random histories of the planner."""
    began = time.monotonic()
    run_histories(seed, count)
    figures |= {"passed": count, "seconds": round(time.monotonic() - began)}
    say(f"{count} random histories of the planner: every invariant held")
    return True


def fault_points(figures: Figures, seed: int, points: str, record: Path | None) -> bool:
    """Every fault point, or so many, on a light cluster."""
    which = ["--all"] if points == "all" else ["--count", points]
    which += ["--record", str(record)] if record is not None else []
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.operator.fault_sweep", *which, "--seed", str(seed)]
    told = []
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        for text in running.stdout:  # it takes more than an hour, and tells how far it is
            told.append(text)
            say(text.rstrip())
    figures |= {"which": points, **counts("".join(told)), "seconds": round(time.monotonic() - began)}
    return running.returncode == 0 and struck_well(figures["points"], figures["passed"], figures["failed"])


def positive(text: str) -> int:
    """A number of things to do; parts to leave out are left out by --only."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def positive_or_all(text: str) -> str:
    """``all``, or a number."""
    return text if text == "all" else str(positive(text))


def main() -> None:
    """Entry point; exits 1 unless everything is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kills", type=positive, default=10)
    parser.add_argument("--steps", type=positive, default=300, help="of the job that is killed")
    parser.add_argument(
        "--cluster-fault-points", type=positive, default=10, help="before the real cluster's API server"
    )
    parser.add_argument("--pairs", type=positive, default=3, help="of runs that tell what checkpoints cost")
    parser.add_argument("--histories", type=positive, default=1000, help="random histories of the planner")
    parser.add_argument(
        "--fault-points", type=positive_or_all, default="all", help="how many, spread over all kinds; or all"
    )
    parser.add_argument("--record", type=Path, help="outcomes of fault points: what stands in it is not run again")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="these parts instead of all; the others' figures stay in the file"
    )
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    runs: dict[str, Callable[[Figures], bool]] = {
        "killed-job": partial(killed_job, seed=given.seed, steps=given.steps, kills=given.kills),
        "cluster-fault-points": partial(cluster_fault_points, seed=given.seed, count=given.cluster_fault_points),
        "node-lost": partial(node_lost, say=say),
        "checkpoint-cost": partial(checkpoint_cost, pairs=given.pairs),
        "histories": partial(histories, seed=given.seed, count=given.histories),
        "fault-points": partial(fault_points, seed=given.seed, points=given.fault_points, record=given.record),
    }
    unknown = [name for name in given.only or () if name not in runs]
    if unknown:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(runs)}")

    say(f"seed {given.seed}")
    results: Figures = {}
    if given.only and given.json and given.json.exists():
        results = json.loads(given.json.read_text())  # the other parts' stay
    results |= {"cpus": os.cpu_count(), "machine": platform.machine()}

    def write(key: str) -> None:
        figures = results[key]
        say(f"{key}: {'as it should be' if figures['good'] else 'NOT as it should be ' + figures.get('failure', '')}\n")
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            given.json.write_text(json.dumps(results, indent=1) + "\n")

    parts = [Part(name, run) for name, run in runs.items() if name in (given.only or runs)]
    sys.exit(0 if run_parts(parts, given.seed, results, write) else 1)


if __name__ == "__main__":
    main()
