"""One job from apply to its end, undisturbed or with kills, and what each kill cost."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from finetune_cluster.api import Api
from finetune_cluster.instance import Instance, require
from tests.chaos import logs as log
from tests.chaos.kills import Killer
from tests.chaos.logs import Line, StageLogs
from tests.chaos.schedule import INTERRUPTING, Kill, Kind, Moment
from tests.e2e.stack import BUCKET, Job, Space, finished, is_true, rows, spec_for

STEP_SECONDS = 600.0
"""For anything that is waited for while training goes on."""
AGAIN_SECONDS = 400.0
"""From a kill to training again; the Job controller alone waits up to 80 s before it replaces the fourth pod."""
COMPARED = ("adapter_model.safetensors", "adapter_config.json")
INTERVAL = 10
"""Steps between two checkpoints."""
METHOD = {"type": "QLoRA", "lora": {"rank": 4, "dropout": 0.2}}
BATCH = {"globalBatchSequences": 16, "microBatchSequences": 2}
"""On the tiny model and a CPU: steps of about a third of a second."""


@dataclass
class Struck:
    """A kill, where it fell, and what it cost."""

    kind: Kind
    phase: str
    """status.phase."""
    step: int
    """Steps made when it fell."""
    checkpoint_step: int
    """The newest whose checkpoint was complete."""
    steps_recomputed: int = 0
    seconds_to_training: float | None = None
    """From the kill to the next training step: for a kill that does not touch training this is one step's time."""
    seconds_to_answer: float | None = None
    """Until operator, store or API server were ready again."""
    seconds_to_status: float | None = None
    """Until status told of a later step than when it fell."""

    @property
    def while_training(self) -> bool:
        """Whether it fell while training went on past its first checkpoint that was due by the interval: one follows the very first
        step of each execution, and to lose only what is behind that proves little."""
        return self.phase == "Training" and self.step > 0 and self.checkpoint_step >= INTERVAL


@dataclass
class Ended:
    """A finished job and its files."""

    job: Job
    files: dict[str, bytes]
    result: dict[str, Any]
    """train/result.json"""
    seconds: float
    struck: list[Struck] = field(default_factory=list)

    @property
    def blocked_seconds(self) -> list[float]:
        """How long each checkpoint held the step loop up."""
        return list(self.result["checkpointBlockedSeconds"])


def training_spec(data_uri: str, steps: int, **overrides: Any) -> dict[str, Any]:
    """QLoRA with dropout, which draws random numbers at every step, with a checkpoint every few steps."""
    spec = spec_for(
        data_uri,
        method=METHOD,
        training={"length": {"steps": steps}, **BATCH, "seed": 7},
        recovery={"checkpoint": {"interval": {"steps": INTERVAL}}},
    )
    spec["output"]["workspace"] = {"retention": "Keep"}
    for key, value in overrides.items():
        spec[key] = {**spec.get(key, {}), **value} if isinstance(value, dict) else value
    return spec


def data(space: Space) -> str:
    """Rows for it."""
    return space.put(rows(200))


@dataclass
class Life:
    """A job that is being watched."""

    space: Space
    name: str
    instance: Instance
    api: Api
    logs: StageLogs

    @property
    def path(self) -> str:
        """Of the jobs of its namespace."""
        return f"/apis/finetune.dev/v1alpha1/namespaces/{self.space.name}/finetunejobs"

    def now(self) -> Job:
        """The job."""
        return self.api.get(f"{self.path}/{self.name}")

    def until(self, reached: Callable[[Job], bool], seconds: float, what: str) -> Job:
        """The first version for which it holds; goes on while the API server is away."""
        return self.api.wait(self.path, self.name, reached, seconds, what)

    def until_step(self, step: int) -> Line:
        """Wait until training is at a step, as the newest line tells."""
        return self.logs.until(
            lambda lines: (
                next((x for x in reversed(lines) if x.step is not None and x.step >= step), None)
                if log.newest_step(lines) >= step
                else None
            ),
            STEP_SECONDS,
            f"step {step}",
        )

    def until_stage(self, stage: str) -> Line:
        """Wait for the first line of a stage's container."""
        return self.logs.until(
            lambda lines: next((x for x in lines if x.stage == stage), None), STEP_SECONDS, f"the first line of {stage}"
        )

    def strike(self, kind: Kind, stage: str = "train") -> Struck:
        """One kill, and wait until what it hit goes on."""
        status = self.now()["status"]
        before = self.logs.lines
        pod = Killer(self.instance, self.api, self.space.name, self.name)
        struck = Struck(kind, status["phase"], log.newest_step(before), log.newest_checkpoint(before))
        training = bool(log.steps(before)) and stage == "train"
        uid = pod.stage_pod(stage)["metadata"]["uid"] if kind in INTERRUPTING else ""
        at = time.time()
        back = pod.kill(kind, stage)
        if back is not None:
            back()
            struck.seconds_to_answer = time.time() - at
        if not training:
            return struck
        if kind not in INTERRUPTING:
            told = int(status.get("progress", {}).get("step") or 0)
            self.until(lambda job: told < _told_step(job) or finished(job), STEP_SECONDS, "status moves on")
            struck.seconds_to_status = time.time() - at
            step = self.logs.until(
                lambda lines: log.first_after(lines, at, lambda x: x.step is not None), AGAIN_SECONDS, "a step"
            )
            struck.seconds_to_training = step.at - at
            return struck
        self._measure(struck, at, uid)
        return struck

    def _measure(self, struck: Struck, at: float, uid: str) -> None:
        def again(lines: list[Line]) -> Line | None:
            began = at
            if struck.kind is Kind.WORKER:
                restart = log.first_after(lines, at, lambda x: log.RESTARTED.search(x.text) is not None)
                if restart is None:
                    return None
                began = restart.at
            return log.first_after(
                lines, began, lambda x: x.step is not None and (x.uid != uid or struck.kind is Kind.WORKER)
            )

        step = self.logs.until(again, AGAIN_SECONDS, f"training goes on after {struck.kind}")
        made = log.newest_step([x for x in self.logs.lines if x.at < step.at])
        assert step.step is not None
        struck.step = made
        struck.steps_recomputed = made + 1 - step.step
        struck.seconds_to_training = step.at - at

    def until_finished(self, seconds: float = STEP_SECONDS) -> Job:
        """Its end."""
        return self.until(finished, seconds, f"{self.name} is finished")


def _told_step(job: Job) -> int:
    return int(job.get("status", {}).get("progress", {}).get("step") or 0)


class Lives:
    """Starts jobs of a namespace and watches them. Used as a context."""

    def __init__(self, space: Space) -> None:
        assert space.target.cluster_name is not None, "processes are killed on the node: only on the local cluster"
        self._space = space
        self._instance = require(space.target.cluster_name)

    def __enter__(self) -> Lives:
        self._opened = ExitStack()
        self._api = self._opened.enter_context(Api(self._instance.kubeconfig))
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def begin(self, name: str, spec: dict[str, Any]) -> Life:
        """``kubectl apply``."""
        logs = self._opened.enter_context(StageLogs(self._instance, self._space.name, name))
        self._space.apply(name, spec)
        return Life(self._space, name, self._instance, self._api, logs)


def live(
    space: Space,
    name: str,
    spec: dict[str, Any],
    kills: Iterable[Kill] = (),
    tell: Callable[[Struck], None] | None = None,
) -> Ended:
    """A job from apply to its end, with kills; ``tell`` hears of each as soon as it is survived.

    Raises:
        AssertionError: it did not succeed.
    """
    began = time.monotonic()
    with Lives(space) as lives:
        life = lives.begin(name, spec)
        struck = []
        for kill in kills:
            stage = "train"
            if isinstance(kill.at, Moment):
                stage = kill.at.value
                life.until_stage(stage)
            else:
                life.until_step(kill.at)
            struck.append(life.strike(kill.kind, stage))
            if tell is not None:
                tell(struck[-1])
        job = life.until_finished()
    return ended(space, job, time.monotonic() - began, struck)


def ended(space: Space, job: Job, seconds: float = 0.0, struck: list[Struck] | None = None) -> Ended:
    """What a job left in the bucket.

    Raises:
        AssertionError: it did not succeed.
    """
    assert is_true(job, "Complete"), json.dumps(job["status"], indent=1)
    prefix = job["status"]["artifacts"]["uri"].removeprefix(f"s3://{BUCKET}/").rstrip("/")

    def get(key: str) -> bytes:
        return space.bucket.get_object(Bucket=BUCKET, Key=f"{prefix}/{key}")["Body"].read()

    files = {name: get(f"adapter/{name}") for name in COMPARED}
    return Ended(job, files, json.loads(get("workspace/train/result.json")), seconds, struck or [])


def line(struck: Struck) -> str:
    """A kill in one line."""
    parts = [f"{struck.kind:<24} {struck.phase:<11} step {struck.step:>4}  checkpoint {struck.checkpoint_step:>4}"]
    parts.append(f"recomputed {struck.steps_recomputed:>3}")
    for name, seconds in (
        ("training after", struck.seconds_to_training),
        ("answers after", struck.seconds_to_answer),
        ("status after", struck.seconds_to_status),
    ):
        if seconds is not None:
            parts.append(f"{name} {seconds:.1f} s")
    return "  ".join(parts)


def as_json(struck: Struck) -> dict[str, Any]:
    """For the results file."""
    return {**asdict(struck), "while_training_past_the_first_interval_checkpoint": struck.while_training}
