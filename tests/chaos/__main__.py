"""A job killed at random on the real cluster must leave the same adapter, byte by byte, as one that was left alone.

    python -m tests.chaos [--seed S] [--json FILE]

Then 1,000 random histories of the planner, and a fault at every request and watch event of a job's life on a light cluster.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from demo.target import ROOT
from tests.chaos.api_faults import ClusterFaults
from tests.chaos.histories import run_histories
from tests.chaos.run import Ended, as_json, data, live, training_spec
from tests.chaos.schedule import Kind, schedule
from tests.e2e.stack import new_space, whole_stack

PASSED = re.compile(r"^(\d+) distinct fault points passed$", re.MULTILINE)


def say(text: str) -> None:
    """At once, also into a file."""
    print(text, flush=True)


def kill_run(seed: int, steps: int, kills: int) -> dict[str, Any]:
    """The two runs and their comparison."""
    planned = schedule(seed, steps, kills)
    say("planned: " + ", ".join(f"{k.kind} at {k.at}" for k in planned))
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        stack = opened.enter_context(whole_stack(folder))
        space = opened.enter_context(new_space(stack.target, stack.bucket))
        spec = training_spec(data(space), steps)
        undisturbed = live(space, "undisturbed", spec)
        say(f"undisturbed: {undisturbed.seconds:.0f} s")
        killed = live(space, "killed", spec, planned, say)
    return figures(undisturbed, killed, steps)


def figures(undisturbed: Ended, killed: Ended, steps: int) -> dict[str, Any]:
    """What the results file holds."""
    same = {name: undisturbed.files[name] == killed.files[name] for name in undisturbed.files}
    struck = killed.struck
    status = killed.job["status"]
    times = {
        str(kind): [round(s.seconds_to_training, 1) for s in struck if s.kind is kind and s.seconds_to_training]
        for kind in Kind
    }
    blocked = undisturbed.blocked_seconds
    return {
        "steps": steps,
        "same_bytes": same,
        "seconds_undisturbed": round(undisturbed.seconds, 1),
        "seconds_with_kills": round(killed.seconds, 1),
        "kills": [as_json(s) for s in struck],
        "kills_while_training_past_the_first_checkpoint": sum(s.while_training for s in struck),
        "steps_recomputed": sum(s.steps_recomputed for s in struck),
        "seconds_to_training": {kind: found for kind, found in times.items() if found},
        "apiserver_ready_seconds": [s.seconds_to_answer for s in struck if s.kind is Kind.API_SERVER],
        "apiserver_status_seconds": [s.seconds_to_status for s in struck if s.kind is Kind.API_SERVER],
        "checkpoints": len(blocked),
        "checkpoint_blocked_seconds": {"median": median(blocked), "max": max(blocked), "sum": round(sum(blocked), 3)},
        "attempts": [{k: a.get(k) for k in ("stage", "outcome", "reason", "resumedFromStep", "lastStep")} for a in status["attempts"]],
        "recoveries": [r["reason"] for r in status.get("recoveries", [])],
        "resumed_from_steps": killed.result["resumedFromSteps"],
    }  # fmt: skip


def sweep(points: str, seed: int) -> dict[str, Any]:
    """Every fault point, or so many."""
    which = ["--all"] if points == "all" else ["--count", points]
    began = time.monotonic()
    command = [sys.executable, "-m", "tests.operator.fault_sweep", *which, "--seed", str(seed)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    say(done.stdout)
    found = PASSED.search(done.stdout)
    return {
        "points": points,
        "passed": int(found.group(1)) if found else 0,
        "all_passed": done.returncode == 0,
        "seconds": round(time.monotonic() - began),
    }


def cluster_faults(count: int, seed: int) -> dict[str, Any]:
    """Sampled fault points before the real cluster's API server."""
    began = time.monotonic()
    with ExitStack() as opened:
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        stack = opened.enter_context(whole_stack(folder))
        outcomes = ClusterFaults(stack, folder).run(count, seed, say)
    return {
        "points": [{"fault": str(o.point), "hit": o.hit, "problems": o.problems} for o in outcomes],
        "passed": sum(o.passed for o in outcomes),
        "all_passed": not any(o.problems for o in outcomes),
        "seconds": round(time.monotonic() - began),
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    lines = [f"{'KILLED':<24} {'PHASE':<11} {'STEP':>5} {'CHECKPOINT':>10} {'RECOMPUTED':>10} {'TRAINING AFTER':>14} {'ANSWERS AFTER':>13}"]  # fmt: skip
    for kill in result["kills"]:
        after, answers = (f"{s:.1f} s" if s is not None else "-" for s in (kill["seconds_to_training"], kill["seconds_to_answer"]))  # fmt: skip
        lines.append(f"{kill['kind']:<24} {kill['phase']:<11} {kill['step']:>5} {kill['checkpoint_step']:>10} {kill['steps_recomputed']:>10} {after:>14} {answers:>13}")  # fmt: skip
    blocked = result["checkpoint_blocked_seconds"]
    lines += [
        "",
        f"{result['kills_while_training_past_the_first_checkpoint']} of {len(result['kills'])} kills while training past the first checkpoint",
        f"{result['steps_recomputed']} of {result['steps']} steps computed again",
        f"{result['seconds_undisturbed']:.0f} s undisturbed, {result['seconds_with_kills']:.0f} s with kills",
        f"{result['checkpoints']} checkpoints held the step loop up for {1000 * blocked['median']:.1f} ms each (median; longest {1000 * blocked['max']:.1f} ms)",
        *(f"{name}: {'the same bytes' if same else 'DIFFERENT'}" for name, same in result["same_bytes"].items()),
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Entry point; exits 1 unless everything is as it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--histories", type=int, default=1000, help="random histories of the planner")
    parser.add_argument("--fault-points", default="all", help="how many, spread over all kinds; or all")
    parser.add_argument("--cluster-fault-points", type=int, default=10, help="before the real cluster's API server")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    say(f"seed {given.seed}")
    result: dict[str, Any] = {"seed": given.seed, "cpus": os.cpu_count(), "machine": platform.machine()}
    good = True
    if given.kills:
        result["killed_job"] = kill_run(given.seed, given.steps, given.kills)
        say("\n" + table(result["killed_job"]) + "\n")
        enough = result["killed_job"]["kills_while_training_past_the_first_checkpoint"] >= min(6, given.kills)
        good &= all(result["killed_job"]["same_bytes"].values()) and enough
    if given.cluster_fault_points:
        result["cluster_fault_points"] = cluster_faults(given.cluster_fault_points, given.seed)
        good &= result["cluster_fault_points"]["all_passed"]
    if given.histories:
        began = time.monotonic()
        run_histories(given.seed, given.histories)
        result["histories"] = {"passed": given.histories, "seconds": round(time.monotonic() - began)}
        say(f"{given.histories} random histories of the planner: every invariant held")
    if given.fault_points != "0":
        result["fault_points"] = sweep(given.fault_points, given.seed)
        good &= result["fault_points"]["all_passed"]
    if given.json:
        given.json.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
