"""The parts of ``make chaos``: what each found is written down as soon as it ends, whether well or badly, and the others go on."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Figures = dict[str, Any]
REACHED = 0.9
"""Of the fault points of a run; the last requests of a job's life are Events and lists, which a quicker or slower run may not make."""
COUNTS = re.compile(r"(\d+) passed, (\d+) failed, (\d+) not reached")
"""Of one kind of faults, as the sweep's report has it."""


@dataclass(frozen=True)
class Part:
    """One of them."""

    name: str
    run: Callable[[Figures], bool]
    """Fills its figures in as it goes, and says whether all of them are as they should be."""

    @property
    def key(self) -> str:
        """Where its figures stand in the results."""
        return self.name.replace("-", "_")


def run_parts(parts: Iterable[Part], seed: int, results: Figures, write: Callable[[str], None]) -> bool:
    """Run all of them, each into ``results`` under its key, which ``write`` is told when it ended; whether every one ended well."""
    good = True
    for part in parts:
        figures: Figures = {"seed": seed}
        results[part.key] = figures
        try:
            figures["good"] = part.run(figures)
        except Exception as error:  # noqa: BLE001 - what went wrong is a result too, and must not lose the ones before it
            figures["good"] = False
            figures["failure"] = "".join(traceback.format_exception(error))[-8000:]
        good &= figures["good"]
        write(part.key)
    return good


def struck_well(points: int, passed: int, failed: int) -> bool:
    """Whether a run over fault points shows anything: nearly all were reached, and each of those made no difference."""
    return failed == 0 and passed > 0 and passed >= REACHED * points


def counts(report: str) -> dict[str, int]:
    """How many points a sweep's report tells of, over all kinds of faults."""
    passed, failed, missed = (sum(map(int, column)) for column in zip("000", *COUNTS.findall(report), strict=True))
    return {"points": passed + failed + missed, "passed": passed, "failed": failed, "not_reached": missed}
