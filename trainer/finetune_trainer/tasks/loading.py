"""lm-eval's tasks, loaded once for all that is done with them."""

from __future__ import annotations

import difflib
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
from lm_eval.tasks import TaskManager

from finetune_api.results import TaskDataset
from finetune_trainer.tasks.protocol import AskedTask
from finetune_trainer.tasks.troubles import INSTEAD, Unusable

FEW_SHOT_SEED = 1234
"""lm-eval's own, as the two that follow."""
SEED, NUMPY_SEED = 0, 1234
COMMIT = re.compile("[0-9a-f]{40}")
CODE_METRIC = "code_eval"
RUNS_CODE = f"it runs code that models write, which is not done here: {INSTEAD}"


@dataclass(frozen=True)
class Loaded:
    """One of evaluation.tasks: a task, or those of a group."""

    found: dict[str, Any]
    """lm-eval's ``TaskDict``."""
    drawn: tuple[Any, Any]
    """States of Python's and numpy's random numbers after it was loaded."""

    @property
    def tasks(self) -> dict[str, Any]:
        """By name."""
        return dict(self.found["tasks"])

    def again(self) -> dict[str, Any]:
        """All of it, as when it was loaded: whoever makes its requests draws the same examples each time."""
        random.setstate(self.drawn[0])
        np.random.set_state(self.drawn[1])
        for task in self.tasks.values():
            task.set_fewshot_seed(seed=FEW_SHOT_SEED)
        return self.found

    @property
    def datasets(self) -> list[TaskDataset]:
        """Those of the Hub: datasets keeps each below the commit that it was fetched at."""
        read = {
            (str(task.DATASET_PATH), part)
            for task in self.tasks.values()
            if isinstance(splits := getattr(task, "dataset", None), dict)
            for split in splits.values()
            for file in getattr(split, "cache_files", [])
            for part in Path(file["filename"]).parent.parts
            if COMMIT.fullmatch(part)
        }
        return [TaskDataset(dataset=name, commit=commit) for name, commit in sorted(read)]


def load(asked: AskedTask, folder: Path) -> Loaded:
    """Data included.

    Raises:
        Unusable: it cannot be done here; besides, whatever its code raises.
    """
    own = folder / asked.folder if asked.folder is not None else None
    if own is not None:
        os.chdir(own)  # its YAML names data relative to it
    known = manager(own)
    if asked.name not in known.all_tasks:
        near = ", ".join(difflib.get_close_matches(asked.name, known.all_tasks))
        raise Unusable(
            f"its folder has {', '.join(known.all_tasks) or 'none'}"
            if own is not None
            else f"lm-eval has no task of that name{f' (but {near})' if near else ''}"
        )
    random.seed(SEED)
    np.random.seed(NUMPY_SEED)
    with without_downloaded_code() as refused:
        try:
            found: dict[str, Any] = known.load([asked.name])
        finally:
            if refused:  # lm-eval goes on without a metric that it does not get, and may stumble over that
                raise Unusable(refused[0])
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise Unusable(f"{name}: {RUNS_CODE}")
        if getattr(task, "MULTIMODAL", False):
            raise Unusable(f"{name} is about more than text")
        own_number = task.get_config("num_fewshot")
        if own_number is None or (asked.few_shot is not None and own_number != 0):
            task.set_config(key="num_fewshot", value=asked.few_shot or 0)
    return Loaded(found, (random.getstate(), np.random.get_state()))


@cache
def manager(own: Path | None) -> TaskManager:
    """Of lm-eval's own tasks, whose thousands of files take seconds to read, or of those in a folder."""
    return TaskManager(include_path=own, include_defaults=own is None)


@contextmanager
def without_downloaded_code() -> Iterator[list[str]]:
    """Metrics of the evaluate library are code that it fetches when they are asked for: why each was refused."""
    refused: list[str] = []

    def refuse(path: str, *_: Any, **__: Any) -> None:
        code = path == CODE_METRIC
        refused.append(
            RUNS_CODE
            if code
            else f"its metric {path} is code that the evaluate library downloads, which is not run: {INSTEAD} with a metric of lm-eval's"
        )
        raise Unusable(refused[-1])

    before = evaluate.load
    evaluate.load = refuse
    try:
        yield refused
    finally:
        evaluate.load = before
