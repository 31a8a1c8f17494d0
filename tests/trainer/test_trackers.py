"""Trackers are told of every step once, whatever dies on the way, and nothing of theirs is ever in training's way."""

from __future__ import annotations

import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from finetune_api.spec import TrackerType
from finetune_trainer.trackers.child import environment
from finetune_trainer.trackers.event_files import EVENT_FILE, write_events
from finetune_trainer.trackers.feeder import BATCH, Cursor, Feeder, Pauses, Source
from finetune_trainer.trackers.lines import Known, Line, metrics
from finetune_trainer.trackers.process import shown
from finetune_trainer.trackers.protocol import Ending, Opening
from tests.support.tracker_servers import MlflowServer, TrackioServer, WandbServer

UID = "0a1b2c3d-0000-0000-0000-000000000000"
QUICKLY = Pauses(first=0.2, most=1.0, at_the_end=0.1)
CONFIG = {"spec": {"training": {"seed": 1}, "model": {"uri": "hf://a/b"}}, "modelCommit": None}
SUMMARY = {"final/held_out_loss": 1.5, "final/steps": 7, "final/adapter_uri": "s3://bucket/out/job/adapter"}
FIRST: Line = {"step": 0, "held_out_loss": 3.0}


def step(number: int) -> dict[str, Any]:
    return {
        "step": number, "total_steps": 7, "epoch": number / 7, "loss": 3.0 - number / 4, "learning_rate": 1e-3,
        "grad_norm": float("nan"), "tokens": 10 * number, "tokens_per_second": 100.0, "seconds": float(number), "eta_seconds": 1.0,
    }  # fmt: skip


def evaluation(number: int) -> dict[str, Any]:
    return {"step": number, "held_out_loss": 2.0 + number / 100}


def source(steps: int, *evaluations: int) -> Source:
    made, measured = [step(n) for n in range(1, steps + 1)], [evaluation(n) for n in evaluations]
    return Source([FIRST], lambda: made, lambda: measured)


def opening(kind: TrackerType, folder: Path, endpoint: str | None = None, **secret: str) -> Opening:
    slot = folder / "secret"
    slot.mkdir(exist_ok=True)
    for key, value in secret.items():
        (slot / key).write_text(value)
    return Opening(
        type=kind, project="team", run_name="tone", job="team/tone", run_id=UID, endpoint=endpoint, slot="tracker",
        secret_name="keys", secret_folder=str(slot), work_dir=str(folder / "work"), config=CONFIG,
    )  # fmt: skip


def until(reached: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.05)


@pytest.fixture
def feeders() -> Iterator[ExitStack]:
    """Feeders that a failing test leaves behind are stopped."""
    with ExitStack() as stack:
        yield stack


def feed(feeders: ExitStack, opened: Opening, told: Source, *script: str) -> Feeder:
    command = {"command": (sys.executable, "-c", *script)} if script else {}
    feeder = Feeder(opened, told, QUICKLY, **command)
    feeders.callback(feeder.stop)
    return feeder


# The libraries, as they are.


@pytest.fixture
def restricted(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a pod: neither the home folder nor the one that TMPDIR names exists, and none can be made."""
    monkeypatch.setenv("HOME", "/proc/nobody")
    monkeypatch.setenv("TMPDIR", "/proc/nobody/tmp")


def told_after_a_kill(feeders: ExitStack, opened: Opening, has: Callable[[int], bool], *measured: int) -> Feeder:
    """Two executions: the first is killed after step 4, the second goes on from a checkpoint of step 2, and measures that step if the
    first has not."""
    first = feed(feeders, opened, source(4, *measured))
    until(lambda: has(3))
    first.stop()
    assert first.done(10)
    second = feed(feeders, opened, source(7, 2, 6))
    second.finish(Ending(summary=SUMMARY))
    assert second.done(60)
    assert (second.result().problem, second.result().missing_lines) == (None, 0)
    return second


STEPS = [(n, 3.0 - n / 4) for n in range(1, 8)]
EVALUATIONS = [(0, 3.0), (2, 2.02), (6, 2.06)]


@pytest.mark.usefixtures("restricted")
def test_mlflow_has_one_run_with_every_step_once(feeders: ExitStack, tmp_path: Path) -> None:
    with MlflowServer("mlflow-token") as server:
        opened = opening(TrackerType.MLFLOW, tmp_path, server.url, MLFLOW_TRACKING_TOKEN=server.token or "")
        told = told_after_a_kill(
            feeders, opened, lambda n: bool(server.runs) and (n, 3.0 - n / 4) in server.points("train/loss")
        )
        assert server.points("train/loss") == STEPS
        assert server.points("eval/loss") == EVALUATIONS
        assert server.points("train/grad_norm") == []
        (run,) = server.runs.values()
        assert run["info"]["status"] == "FINISHED"
        assert {"key": "spec.training.seed", "value": "1"} in run["data"]["params"]
        tags = {t["key"]: t["value"] for t in run["data"]["tags"]}
        assert tags["finetune.dev/job-uid"] == UID
        assert tags["finetune.dev/adapter_uri"] == SUMMARY["final/adapter_uri"]
        assert told.result().url == f"{server.url}/#/experiments/1/runs/{run['info']['run_id']}"


@pytest.mark.usefixtures("restricted")
def test_wandb_has_one_run_with_every_step_once(feeders: ExitStack, tmp_path: Path) -> None:
    with WandbServer() as server:
        opened = opening(TrackerType.WEIGHTS_AND_BIASES, tmp_path, server.url, WANDB_API_KEY=server.key)
        told_after_a_kill(feeders, opened, lambda n: (n, 3.0 - n / 4) in server.points("train/loss"))
        assert server.points("train/loss") == STEPS
        assert server.points("eval/loss") == EVALUATIONS
        assert (server.inserted, server.exit_code) == (1, 0)
        assert server.run is not None
        assert (server.run["name"], server.run["displayName"], server.run["project"]) == (UID, "tone", "team")
        assert server.summary.items() >= SUMMARY.items()


@pytest.mark.usefixtures("restricted")
def test_trackio_has_one_run_with_every_step_once(feeders: ExitStack, tmp_path: Path) -> None:
    with TrackioServer(tmp_path) as server:
        opened = opening(TrackerType.TRACKIO, tmp_path, server.url, TRACKIO_WRITE_TOKEN=server.token)

        def logs() -> list[dict[str, Any]]:
            return server.call("get_logs", project="team", run="tone", run_id=UID)

        told_after_a_kill(feeders, opened, lambda n: any(line["step"] == n for line in logs()))
        lines = logs()
        assert [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line] == STEPS
        assert [(line["step"], line["eval/loss"]) for line in lines if "eval/loss" in line] == EVALUATIONS
        assert [line for line in lines if line["step"] == 7][-1].items() >= SUMMARY.items()


@pytest.mark.parametrize("kind", [TrackerType.MLFLOW, TrackerType.WEIGHTS_AND_BIASES])
def test_a_refusal_is_told_once_and_without_the_key(
    feeders: ExitStack, tmp_path: Path, kind: TrackerType, caplog: pytest.LogCaptureFixture
) -> None:
    wrong = "f" * 40
    with MlflowServer("another") if kind is TrackerType.MLFLOW else WandbServer() as server:
        opened = opening(kind, tmp_path, server.url, WANDB_API_KEY=wrong, MLFLOW_TRACKING_TOKEN=wrong)
        feeder = feed(feeders, opened, source(2))
        with caplog.at_level(logging.WARNING):
            until(lambda: feeder.result().problem != "it was not done in time")
            feeder.finish(Ending())
            assert feeder.done(120)
    result = feeder.result()
    assert result.problem is not None
    assert result.missing_lines == 3
    assert any(word in result.problem for word in ("401", "UNAUTHENTICATED", "permission", "Authentication")), (
        result.problem
    )
    assert wrong not in caplog.text + result.problem
    assert len([r for r in caplog.records if "Training goes on" in r.message]) == 1


def test_a_key_that_is_mended_while_training_is_taken_up(feeders: ExitStack, tmp_path: Path) -> None:
    with MlflowServer("right") as server:
        opened = opening(TrackerType.MLFLOW, tmp_path, server.url, MLFLOW_TRACKING_TOKEN="wrong")
        feeder = feed(feeders, opened, source(3))
        until(lambda: feeder.result().problem != "it was not done in time")
        opening(TrackerType.MLFLOW, tmp_path, MLFLOW_TRACKING_TOKEN="right")
        until(lambda: bool(server.runs) and len(server.points("train/loss")) == 3)
        feeder.finish(Ending())
        assert feeder.done(60)
        assert feeder.result().problem is None


def test_a_server_that_never_answers_holds_up_nobody_who_stops(feeders: ExitStack, tmp_path: Path) -> None:
    with MlflowServer() as server:
        server.hangs.set()
        feeder = feed(feeders, opening(TrackerType.MLFLOW, tmp_path, server.url), source(3))
        until(lambda: bool(server.requests))
        began = time.monotonic()
        feeder.stop()
        assert feeder.done(5)
        assert time.monotonic() - began < 2


# Programs in the place of a library.

RAISES = """
import sys
for line in sys.stdin:
    print('{"error":"nobody can use me"}', flush=True)
"""
HANGS = "import time; time.sleep(1000)"
# Keeps what it is told in a file, as a server would, and dies after each log request.
FORGETS = """
import json, os, pathlib, sys
kept = pathlib.Path(os.environ['TRACKIO_DIR']).with_name('kept')
for text in sys.stdin:
    asked = json.loads(text)
    if 'open' in asked:
        steps = [int(n) for n in kept.read_text().split()] if kept.exists() else [-1]
        print(json.dumps({'opened': {'step': max(steps), 'evaluation': 1000}}), flush=True)
    elif 'log' in asked:
        with kept.open('a') as file:
            file.write(''.join(f"{line['step']}\\n" for line in asked['log']))
        os._exit(3)
    else:
        print('{}', flush=True)
"""


def test_a_tracker_that_raises_at_each_call_is_tried_at_a_bounded_rate_and_told_of_once(
    feeders: ExitStack, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        feeder = feed(feeders, opening(TrackerType.MLFLOW, tmp_path), source(2), RAISES)
        until(lambda: feeder.result().problem == "nobody can use me")
        feeder.finish(Ending())
        assert feeder.done(30)
    assert feeder.result().missing_lines == 3
    assert len(caplog.records) == 1


def test_a_process_that_dies_after_it_was_told_is_not_told_again(feeders: ExitStack, tmp_path: Path) -> None:
    steps = 2 * BATCH + 10
    feeder = feed(feeders, opening(TrackerType.MLFLOW, tmp_path), source(steps), FORGETS)
    kept = tmp_path / "work" / "kept"
    until(lambda: kept.exists() and kept.read_text().endswith(f"\n{steps}\n"))
    feeder.finish(Ending())
    assert feeder.done(30)
    assert [int(n) for n in kept.read_text().split()] == list(range(1, steps + 1))
    assert feeder.result().problem is None


def test_a_hanging_process_is_killed_with_all_that_it_started(feeders: ExitStack, tmp_path: Path) -> None:
    script = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', '{HANGS}']); open('{tmp_path}/pid', 'w').write(str(p.pid)); p.wait()"
    feeder = feed(feeders, opening(TrackerType.MLFLOW, tmp_path), source(2), script)
    until(lambda: (tmp_path / "pid").exists() and bool((tmp_path / "pid").read_text()))
    pid = (tmp_path / "pid").read_text()
    assert not feeder.done(0.1)
    feeder.stop()
    assert feeder.done(5)
    until(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])


ALONE = """
import sys, time
from finetune_trainer.trackers.feeder import Feeder, Source
from finetune_trainer.trackers.protocol import Opening
Feeder(Opening.model_validate_json(sys.argv[1]), Source([], list, list))
time.sleep(1000)
"""


def test_a_training_that_is_killed_leaves_no_process_behind(tmp_path: Path) -> None:
    with MlflowServer() as server:
        server.hangs.set()
        text = opening(TrackerType.MLFLOW, tmp_path, server.url).model_dump_json(by_alias=True)
        training = subprocess.Popen([sys.executable, "-c", ALONE, text])
        try:
            until(lambda: bool(server.requests))
            lists = Path(f"/proc/{training.pid}/task").glob("*/children")
            [child] = [pid for found in lists for pid in found.read_text().split()]
        finally:
            training.kill()
            training.wait()
        until(lambda: not Path(f"/proc/{child}").exists() or "Z" in Path(f"/proc/{child}/stat").read_text().split()[2])


# Pure parts.


def test_a_trackers_process_has_no_secret_no_gpu_and_no_telemetry(tmp_path: Path) -> None:
    environ = environment(
        {"PATH": "/bin", "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "FINETUNE_HEARTBEAT_FD": "7"}, tmp_path
    )
    assert environ["PATH"] == "/bin"
    assert not {"HF_HUB_DISABLE_IMPLICIT_TOKEN", "FINETUNE_HEARTBEAT_FD"} & set(environ)
    assert environ["CUDA_VISIBLE_DEVICES"] == ""
    assert environ["WANDB_ERROR_REPORTING"] == "false"
    assert environ["MLFLOW_DISABLE_TELEMETRY"] == environ["DO_NOT_TRACK"] == "true"
    assert environ["HF_HUB_DISABLE_TELEMETRY"] == "1"


def test_lines_come_in_order_and_an_evaluation_after_its_step() -> None:
    cursor = Cursor(source(BATCH + 50, 2, BATCH + 20))
    first, second, third = cursor.next(), cursor.next(), cursor.next()
    assert [line["step"] for line in first] == [0, 1, 2, 2, *range(3, BATCH + 1)]
    assert "held_out_loss" in first[3]
    assert [line["step"] for line in second] == [
        *range(BATCH + 1, BATCH + 21),
        BATCH + 20,
        *range(BATCH + 21, BATCH + 51),
    ]
    assert third == []


def test_what_a_tracker_has_is_known_by_step_and_by_evaluation() -> None:
    known = Known(step=4, evaluation=2)
    assert [known.lacks(line) for line in (step(4), step(5), evaluation(2), evaluation(4))] == [
        False,
        True,
        False,
        True,
    ]
    assert known.and_([step(5), evaluation(4), step(3)]) == Known(5, 4)


def test_numbers_have_the_names_of_transformers_integrations_and_are_finite() -> None:
    assert metrics(step(1)) == {
        "train/loss": 2.75, "train/learning_rate": 1e-3, "train/tokens_per_second": 100.0, "train/tokens": 10.0, "train/epoch": 1 / 7,
    }  # fmt: skip
    assert metrics({"step": 2, "held_out_loss": 2.5, "accuracy": 0.5}) == {"eval/loss": 2.5, "eval/accuracy": 0.5}


def test_the_address_of_a_run_is_shown_without_credentials() -> None:
    assert shown("https://user:key@mlflow.test/#/experiments/1/runs/2") == "https://mlflow.test/#/experiments/1/runs/2"
    assert shown(None) is None


def test_tensorboard_reads_every_point_once(tmp_path: Path) -> None:
    lines = [FIRST, *(step(n) for n in range(1, 8)), evaluation(4)]
    for _ in range(2):
        write_events(tmp_path / EVENT_FILE, sorted(lines, key=lambda line: line["step"]), CONFIG)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in found.Scalars("train/loss")] == STEPS
    assert [e.step for e in found.Scalars("eval/loss")] == [0, 4]
    seconds = [e.wall_time for e in found.Scalars("train/loss")]
    assert [round(s - seconds[0]) for s in seconds] == [0, 1, 2, 3, 4, 5, 6]
    assert b'"uri": "hf://a/b"' in found.Tensors("config")[0].tensor_proto.string_val[0]
    assert "train/grad_norm" not in found.Tags()["scalars"]
