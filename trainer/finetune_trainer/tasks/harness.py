"""lm-eval, in a process of its own. It never loads a model."""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from pydantic import TypeAdapter

from finetune_api.results import TaskAnswers, TaskDataset, TaskReplies
from finetune_trainer.sources.hub import PUBLIC_ENDPOINT, trust
from finetune_trainer.tasks.loading import Loaded, load, without_downloaded_code
from finetune_trainer.tasks.protocol import (
    ASKED,
    ERROR,
    REPLIES,
    REQUESTS,
    SCORES,
    Asked,
    AskedTask,
    Command,
    Continuation,
    Generated,
    Requests,
    Score,
    generated_of,
)
from finetune_trainer.tasks.troubles import Unusable, trouble

BOOTSTRAPS = 1000
"""For the standard errors of metrics that are no means."""
SCORE_PAIRS = TypeAdapter(list[tuple[Score, Score]])


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


class Rehearsal(LM):  # type: ignore[misc]
    """A model that says the same to everything."""

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        """More or less likely in turn."""
        return [(-1.0 - number % 7, number % 2 == 0) for number, _ in enumerate(requests)]

    def generate_until(self, requests: list[Any]) -> list[str]:
        """A sentence with a number in it."""
        return ["The answer is 1."] * len(requests)

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Refused when requests were made."""
        raise NotImplementedError


def fetch(asked: Asked, folder: Path) -> None:
    """The data of all tasks, into the folder's cache."""
    for each in asked.tasks:
        with named(each.name):
            load(each, folder)


def requests_of(asked: Asked, folder: Path) -> Requests:
    """What the models are asked by all tasks, each once, and proof that lm-eval can score what they answer."""
    continuations: dict[Continuation, None] = {}
    generated: dict[Generated, None] = {}
    left_out: list[str] = []
    datasets: dict[TaskDataset, None] = {}
    for each in asked.tasks:
        with named(each.name):
            loaded = load(each, folder)
            likely, said = asked_by(each, loaded)
            if said and not asked.generates:
                left_out.append(each.name)
                continue
            with named("what is answered cannot be scored"):
                list(scores_of(each, loaded, Rehearsal(), bootstraps=0))
            continuations |= dict.fromkeys(likely)
            generated |= dict.fromkeys(said)
            datasets |= dict.fromkeys(loaded.datasets)
    return Requests(
        continuations=list(continuations), generated=list(generated), left_out=left_out, datasets=list(datasets)
    )


def asked_by(asked: AskedTask, loaded: Loaded) -> tuple[list[Continuation], list[Generated]]:
    """The requests of one of evaluation.tasks.

    Raises:
        Unusable: it wants what is not answered.
    """
    likely: list[Continuation] = []
    said: list[Generated] = []
    loaded.again()
    for name, task in loaded.tasks.items():
        task.build_all_requests(limit=asked.limit, rank=0, world_size=1)
        for request in task.instances:
            match request.request_type:
                case "loglikelihood":
                    context, text = request.args
                    likely.append(Continuation(context=context, continuation=text))
                case "generate_until":
                    said.append(generated_of(*request.args))
                case other:
                    raise Unusable(f"{name} asks for {other}, and only loglikelihood and generate_until are answered")
    return likely, said


@contextmanager
def named(what: str) -> Iterator[None]:
    """What is raised says of which task, or doing what."""
    try:
        yield
    except Exception as error:
        error.add_note(what)
        raise


def scores_of(asked: AskedTask, loaded: Loaded, lm: LM, bootstraps: int = BOOTSTRAPS) -> Iterator[Score]:
    """All numbers of a task, groups first."""
    with without_downloaded_code():
        found = evaluate(
            lm=lm, task_dict=loaded.again(), limit=asked.limit, log_samples=False, bootstrap_iters=bootstraps
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


def both_scores(asked: Asked, folder: Path) -> list[tuple[Score, Score]]:
    """Base and tuned side by side. Both have the same numbers, unless one is not finite: then it is left out."""
    requests = Requests.model_validate_json((folder / REQUESTS).read_bytes())
    replies = TaskAnswers.model_validate_json((folder / REPLIES).read_bytes())
    pairs: list[tuple[Score, Score]] = []
    for each in (task for task in asked.tasks if task.name not in requests.left_out):
        with named(each.name):
            loaded = load(each, folder)
            base, tuned = (
                {(s.task, s.metric, s.filter): s for s in scores_of(each, loaded, Replay(requests, side))}
                for side in (replies.base, replies.tuned)
            )
        pairs += [(base[key], tuned[key]) for key in base if key in tuned]
    return pairs


def ready_for_hub() -> None:
    """A mirror of the Hub is trusted as the Secret says, and has no dataset viewer, which datasets would ask beside it."""
    trust(os.environ.get("AWS_CA_BUNDLE"))
    datasets.config.USE_PARQUET_EXPORT = datasets.config.HF_ENDPOINT.rstrip("/") == PUBLIC_ENDPOINT


def main(command: Command, folder: Path) -> int:
    """Do it; 1 with ``error.json`` where that fails."""
    folder = folder.resolve()
    asked = Asked.model_validate_json((folder / ASKED).read_bytes())
    try:
        match command:
            case Command.DATA:
                ready_for_hub()
                fetch(asked, folder)
            case Command.REQUESTS:
                (folder / REQUESTS).write_text(requests_of(asked, folder).model_dump_json(by_alias=True))
            case Command.SCORES:
                (folder / SCORES).write_bytes(SCORE_PAIRS.dump_json(both_scores(asked, folder), by_alias=True))
    except Exception as error:  # noqa: BLE001 - tasks are code of many authors and raise anything
        (folder / ERROR).write_text(json.dumps(trouble(error, offline=command is not Command.DATA).to_json_dict()))
        return 1
    return 0
