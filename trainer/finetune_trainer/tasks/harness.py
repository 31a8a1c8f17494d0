"""``python -m finetune_trainer.tasks.harness COMMAND FOLDER``: lm-eval, in a process of its own. It never loads a model."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager
from pydantic import TypeAdapter

from finetune_api.results import TaskAnswers, TaskReplies
from finetune_trainer.tasks.protocol import (
    ASKED,
    ERROR,
    REPLIES,
    REQUESTS,
    SCORES,
    AskedTask,
    Command,
    Continuation,
    Failure,
    Generated,
    Requests,
    Score,
    Trouble,
    generated_of,
)
from finetune_trainer.text import shorten

FEW_SHOT_SEED = 1234
"""lm-eval's own."""
BOOTSTRAPS = 1000
"""For the standard errors of metrics that are no means."""
ASKED_TASKS = TypeAdapter(list[AskedTask])
SCORE_PAIRS = TypeAdapter(list[tuple[Score, Score]])


class Unusable(Exception):
    """A task that cannot be done here, and why."""


class Replay(LM):  # type: ignore[misc]
    """A model that has answered already."""

    def __init__(self, requests: Requests, replies: TaskReplies) -> None:
        super().__init__()
        likely = zip(replies.log_likelihoods, replies.greedy, strict=True)
        self._likely = dict(zip(requests.continuations, likely, strict=True))
        self._texts = dict(zip(requests.generated, replies.texts, strict=True))

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """The sum over the continuation's tokens, and whether the model would say it."""
        return [self._likely[Continuation(context=c, continuation=t)] for c, t in (r.args for r in requests)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """What it said."""
        return [self._texts[generated_of(*r.args)] for r in requests]

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Refused when requests were made."""
        raise NotImplementedError


def load(asked: AskedTask, folder: Path) -> dict[str, Any]:
    """lm-eval's tasks, data included."""
    own = folder / asked.folder if asked.folder is not None else None
    if own is not None:
        os.chdir(own)  # its YAML names data relative to it
    manager = TaskManager(include_path=own, include_defaults=own is None)
    if asked.name not in manager.all_tasks:
        known = (
            f"its folder has {', '.join(manager.all_tasks) or 'none'}"
            if own is not None
            else "lm-eval has no task of that name"
        )
        raise Unusable(known)
    loaded: dict[str, Any] = manager.load([asked.name])
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise Unusable(f"{name} runs code that models write")
        if getattr(task, "MULTIMODAL", False):
            raise Unusable(f"{name} is about more than text")
        own_number = task.get_config("num_fewshot")
        if own_number is None or (asked.few_shot is not None and own_number != 0):
            task.set_config(key="num_fewshot", value=asked.few_shot or 0)
        task.set_fewshot_seed(seed=FEW_SHOT_SEED)
    return loaded


def requests_of(tasks: list[AskedTask], folder: Path) -> Requests:
    """What the models are asked by all tasks, each once."""
    continuations: dict[Continuation, None] = {}
    generated: dict[Generated, None] = {}
    for asked in tasks:
        with named(asked):
            for name, request in instances_of(asked, folder):
                match request.request_type:
                    case "loglikelihood":
                        context, text = request.args
                        continuations[Continuation(context=context, continuation=text)] = None
                    case "generate_until":
                        generated[generated_of(*request.args)] = None
                    case other:
                        raise Unusable(
                            f"{name} asks for {other}, and only loglikelihood and generate_until are answered"
                        )
    return Requests(continuations=list(continuations), generated=list(generated))


def instances_of(asked: AskedTask, folder: Path) -> Iterator[tuple[str, Any]]:
    """lm-eval's requests, with the names of their tasks."""
    for name, task in load(asked, folder)["tasks"].items():
        task.build_all_requests(limit=asked.limit, rank=0, world_size=1)
        yield from ((name, request) for request in task.instances)


@contextmanager
def named(asked: AskedTask) -> Iterator[None]:
    """What is raised says of which task."""
    try:
        yield
    except Exception as error:
        error.add_note(asked.name)
        raise


def scores_of(asked: AskedTask, folder: Path, lm: LM) -> Iterator[Score]:
    """All numbers of a task, groups first."""
    found = evaluate(
        lm=lm, task_dict=load(asked, folder), limit=asked.limit, log_samples=False, bootstrap_iters=BOOTSTRAPS
    )
    for task, values in itertools.chain(found.get("groups", {}).items(), found["results"].items()):
        for key, value in values.items():
            metric, _, kind = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            if not kind or metric.endswith("_stderr") or not number:
                continue
            error = values.get(f"{metric}_stderr,{kind}")
            yield Score(
                task=task,
                metric=metric,
                filter=kind,
                value=float(value),
                stderr=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                documents=found["n-samples"].get(task, {}).get("effective", 0),
                few_shot=found["n-shot"].get(task),
                higher_is_better=found["higher_is_better"].get(task, {}).get(metric),
                part_of=asked.name if task != asked.name else None,
            )


def both_scores(tasks: list[AskedTask], folder: Path) -> list[tuple[Score, Score]]:
    """Base and tuned side by side. Both have the same numbers, unless one is not finite: then it is left out."""
    requests = Requests.model_validate_json((folder / REQUESTS).read_bytes())
    replies = TaskAnswers.model_validate_json((folder / REPLIES).read_bytes())
    pairs: list[tuple[Score, Score]] = []
    for asked in tasks:
        with named(asked):
            base, tuned = (
                {(s.task, s.metric, s.filter): s for s in scores_of(asked, folder, Replay(requests, side))}
                for side in (replies.base, replies.tuned)
            )
        pairs += [(base[key], tuned[key]) for key in base if key in tuned]
    return pairs


def trouble(error: Exception) -> Trouble:
    """In the words of the failure table."""
    names = {c.__name__ for c in type(error).__mro__}
    if names & {"GatedRepoError", "ManualGated"} or "gated dataset" in str(error):
        failure = Failure.NOT_ALLOWED
    elif names & {"ConnectionError", "TransportError", "OfflineModeIsEnabled", "LocalEntryNotFoundError"}:
        failure = Failure.AWAY
    elif names & {"DatasetNotFoundError", "RepositoryNotFoundError"}:
        failure = Failure.NOT_FOUND
    else:
        failure = Failure.UNUSABLE
    told = str(error) if isinstance(error, Unusable) else f"{type(error).__name__}: {error}"
    of = "".join(f"{note}: " for note in getattr(error, "__notes__", []))
    return Trouble(failure=failure, message=shorten(f"{of}{' '.join(told.split())}", 500))


def main(command: Command, folder: Path) -> int:
    """Do it; 1 with ``error.json`` where that fails."""
    folder = folder.resolve()
    tasks = ASKED_TASKS.validate_json((folder / ASKED).read_bytes())
    try:
        if command is Command.REQUESTS:
            (folder / REQUESTS).write_text(requests_of(tasks, folder).model_dump_json(by_alias=True))
        else:
            (folder / SCORES).write_bytes(SCORE_PAIRS.dump_json(both_scores(tasks, folder), by_alias=True))
    except Exception as error:  # noqa: BLE001 - tasks are code of many authors and raise anything
        (folder / ERROR).write_text(json.dumps(trouble(error).to_json_dict()))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Command(sys.argv[1]), Path(sys.argv[2])))
