"""The planner's peaks against simulated ones: ``python -m bench.planner_accuracy [--live model]``.

Reads the golden files (tests/planner/golden), which come from simulated training steps; with ``--live`` simulates one model's grid
anew. Errors are of the whole peak (what decides whether a run fits) and of what a step adds to what is held.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import dataclass

from finetune_api.planner import plan
from tests.planner.cases import request_for
from tests.planner.simulator.golden import EVALUATION_TOKENS, HELD_OUT, MODELS, cases_of, read_config, read_golden
from tests.planner.simulator.step import Case, Simulated, simulate

GIB = 1 << 30


@dataclass(frozen=True)
class Comparison:
    """One case."""

    case: Case
    simulated: int
    predicted: int
    step_error: float

    @property
    def error(self) -> float:
        """Of the peak; positive where the planner says more."""
        return self.predicted / self.simulated - 1


def compare(case: Case, simulated: Simulated) -> Comparison:
    """Plan the case."""
    planned = plan(request_for(case))
    step = simulated.step_peak_bytes - simulated.held_bytes
    held = planned.peak_allocated_bytes - (
        planned.weight_bytes
        + planned.quantization_constant_bytes
        + planned.adapter_bytes
        + planned.gradient_bytes
        + planned.optimizer_bytes
    )
    return Comparison(case, simulated.step_peak_bytes, planned.peak_allocated_bytes, held / step - 1)


def evaluations(case: Case, simulated: Simulated) -> Comparison:
    """The same for the evaluation batch."""
    predicted = plan(request_for(case)).peak_evaluation_bytes
    return Comparison(case, simulated.evaluation_peak_bytes, predicted, 0.0)


def live(model: str) -> list[tuple[Case, Simulated]]:
    """Simulate now."""
    config = read_config(model)
    return [(case, simulate(case, config, EVALUATION_TOKENS if case.checkpointing else 0)) for case in cases_of(model)]


def summary(name: str, errors: list[float]) -> str:
    """Smallest, median and largest error."""
    return f"| {name} | {len(errors)} | {min(errors):+.1%} | {statistics.median(errors):+.1%} | {max(errors):+.1%} |"


def main() -> None:
    """Print every case, then a summary per model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--live", metavar="MODEL", choices=sorted(MODELS | HELD_OUT))
    arguments = parser.parse_args()
    models = [arguments.live] if arguments.live else list(MODELS | HELD_OUT)
    rows: dict[str, list[Comparison]] = {}
    evaluated: list[Comparison] = []
    print("| case | simulated GiB | predicted GiB | error | error of the step's part |\n|---|---|---|---|---|")
    for model in models:
        cases = live(model) if arguments.live else read_golden(model)
        rows[model] = [compare(case, simulated) for case, simulated in cases]
        evaluated += [evaluations(case, s) for case, s in cases if s.evaluation_peak_bytes]
        for c in rows[model]:
            print(
                f"| {c.case.name()} | {c.simulated / GIB:.2f} | {c.predicted / GIB:.2f} | {c.error:+.1%} | {c.step_error:+.1%} |"
            )
    print("\n| model | cases | min | median | max |\n|---|---|---|---|---|")
    for model, comparisons in rows.items():
        print(summary(model, [c.error for c in comparisons]))
    for name, kinds in (("grid", MODELS), ("held out", HELD_OUT)):
        every = [c for model, comparisons in rows.items() if model in kinds for c in comparisons]
        if every:
            print(summary(f"{name}: peak of training", [c.error for c in every]))
            print(summary(f"{name}: the step's part", [c.step_error for c in every]))
    print(summary("all: peak of evaluation", [c.error for c in evaluated]))


if __name__ == "__main__":
    main()
