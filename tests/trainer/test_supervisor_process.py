"""The supervisor over real processes, and a pod killed in every way there is."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_api.failures import FAILURES, Reason
from finetune_api.names import ENV_GPUS_PER_NODE, ENV_GRACE_SECONDS
from finetune_api.progress import Split, StageReport
from finetune_trainer.supervisor import process
from finetune_trainer.supervisor import run as supervisor
from finetune_trainer.supervisor.process import Ended, Patience, Stop, Word, run_workers
from tests.operator.manifests import train_report
from tests.support.prepared import PreparedJob, prepare_job
from tests.support.train_container import ENV_MOST_ROWS
from tests.support.train_process import TrainPod, kill_all, pod_of, steps
from tests.trainer.test_train_resume import adapter, forget_the_result, markers, posts, result

REPORT = '{"stage": "train", "succeeded": false, "reason": "OutOfMemory", "message": "m"}'


def worker(tmp_path: Path, code: str, patience: Patience | None = None) -> Ended:
    with Stop() as stop:
        return run_workers(
            [sys.executable, "-c", code], [dict(os.environ)], tmp_path, patience or Patience(60, 60, 60), stop
        )


def test_what_a_process_leaves_is_read(tmp_path: Path) -> None:
    code = f"""
import os, sys
os.write(int(os.environ["FINETUNE_HEARTBEAT_FD"]), b"Loading\\nTraining\\n")
open(os.environ["FINETUNE_OUTCOME"], "w").write({REPORT!r})
sys.exit(40)
"""
    ended = worker(tmp_path, code)
    assert (ended.returncode, ended.activity, ended.told_to_stop) == (40, "Training", False)
    assert ended.report is not None
    assert ended.report.reason == "OutOfMemory"


def test_an_outcome_of_an_earlier_process_is_not_taken_for_this_ones(tmp_path: Path) -> None:
    (tmp_path / "outcome-0.json").write_text(REPORT)
    assert worker(tmp_path, "import os; os.kill(os.getpid(), 9)") == Ended(
        -9, None, memory_kills=0, peak_bytes=worker(tmp_path, "").peak_bytes
    )


def test_silence_ends_a_process_and_beats_keep_it(tmp_path: Path) -> None:
    silent = worker(tmp_path, "import signal; signal.pause()", Patience(1.0, 1.0, 60))
    assert silent.returncode == -signal.SIGUSR1 or silent.returncode == -signal.SIGKILL
    assert silent.silent_seconds is not None
    beating = """
import os, time
for _ in range(20):
    os.write(int(os.environ["FINETUNE_HEARTBEAT_FD"]), b"Training\\n")
    time.sleep(0.2)
"""
    assert worker(tmp_path, beating, Patience(2.0, 20.0, 60)).silent_seconds is None


def test_a_process_that_hangs_leaves_its_stacks_in_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    code = """
import faulthandler, os, signal, threading
faulthandler.register(signal.SIGUSR1, all_threads=True)
os.write(int(os.environ["FINETUNE_HEARTBEAT_FD"]), b"Training\\n")
def hangs_here():
    threading.Event().wait()
hangs_here()
"""
    assert worker(tmp_path, code, Patience(1.0, 20.0, 60)).silent_seconds is not None
    assert "hangs_here" in capfd.readouterr().err


def test_sigterm_is_passed_on_and_a_process_that_ignores_it_is_killed(tmp_path: Path) -> None:
    code = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.kill(os.getppid(), signal.SIGTERM)
while True:
    signal.pause()
"""
    ended = worker(tmp_path, code, Patience(60, 60, 1.0))
    assert (ended.returncode, ended.told_to_stop, ended.stop_overdue) == (-signal.SIGKILL, True, True)
    ended = worker(tmp_path, "import os, signal; os.kill(os.getppid(), 15); signal.pause()")
    assert (ended.returncode, ended.stop_overdue) == (-signal.SIGTERM, False)


class News:
    """Other pods that say something once a file is there."""

    def __init__(self, word: Word, ready: Path) -> None:
        self._word = word
        self._reader, self._writer = os.pipe()
        threading.Thread(target=self._speak, args=(ready,), daemon=True).start()

    def _speak(self, ready: Path) -> None:
        while not ready.exists():
            time.sleep(0.01)
        os.write(self._writer, b"x")

    def fileno(self) -> int:
        return self._reader

    def heard(self) -> Word:
        os.read(self._reader, 1)
        return self._word

    def beat(self) -> None:
        pass


class Chatter(News):
    """Other pods that show signs of life for a while."""

    def _speak(self, ready: Path) -> None:
        for _ in range(20):
            os.write(self._writer, b"x")
            time.sleep(0.1)
        ready.touch()


def test_other_pods_signs_of_life_keep_ranks_that_wait_for_them(tmp_path: Path) -> None:
    code = f"""
import os, time
os.write(int(os.environ["FINETUNE_HEARTBEAT_FD"]), b"Loading\\n")
while not os.path.exists("{tmp_path}/ready"):
    time.sleep(0.05)
"""
    with Stop() as stop:
        others = Chatter(Word.GO_ON, tmp_path / "ready")
        ended = run_workers(
            [sys.executable, "-c", code], [dict(os.environ)], tmp_path, Patience(1, 1, 60), stop, others
        )
    assert (ended.returncode, ended.silent_seconds) == (0, None)


@pytest.mark.parametrize(
    ("word", "activity", "saved"),
    [
        (Word.LEAVE, "Training", True),
        (Word.LEAVE, "Loading", False),
        (Word.ABORT, "Training", False),
        (Word.GO_ON, "Loading", True),
    ],
)
def test_ranks_may_save_when_all_were_told_to_stop_and_not_when_others_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: Word, activity: str, saved: bool
) -> None:
    monkeypatch.setattr(process, "LEAVE_SECONDS", 0.1)
    code = f"""
import os, pathlib, time
os.write(int(os.environ["FINETUNE_HEARTBEAT_FD"]), b"{activity}\\n")
time.sleep(0.5)
pathlib.Path("{tmp_path}/ready").touch()
time.sleep(1)
pathlib.Path("{tmp_path}/saved").touch()
"""

    news = News(word, tmp_path / "ready")
    with Stop() as stop:
        ended = run_workers(
            [sys.executable, "-c", code], [dict(os.environ)], tmp_path, Patience(60, 60, 30), stop, news
        )
    assert (tmp_path / "saved").exists() is saved
    assert ended.aborted is not saved


def test_a_rank_that_left_as_all_agreed_to_does_not_cut_off_the_one_that_saves(tmp_path: Path) -> None:
    """Another pod was told to stop: the signal comes to none of this pod's ranks."""
    code = f"""
import os, pathlib, sys, time
os.write(int(os.environ["FINETUNE_HEARTBEAT_FD"]), b"Training\\n")
if os.environ["RANK"] == "1":
    time.sleep(0.5)
    sys.exit(60)
time.sleep(2)
pathlib.Path("{tmp_path}/saved").touch()
open(os.environ["FINETUNE_OUTCOME"], "w").write({REPORT.replace("OutOfMemory", "Interrupted")!r})
sys.exit(60)
"""
    environs = [{**os.environ, "RANK": str(rank)} for rank in range(2)]
    with Stop() as stop:
        ended = run_workers([sys.executable, "-c", code], environs, tmp_path, Patience(60, 60, 30), stop)
    assert (tmp_path / "saved").exists()
    assert ended.returncode == 60
    assert ended.interrupted


STUCK = """
import os, pathlib, signal, time
rank = os.environ["RANK"]
if rank == "{stuck}":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
os.write(int(os.environ["FINETUNE_HEARTBEAT_FD"]), b"{activity}\\n")
pathlib.Path("{folder}/ready-" + rank).touch()
if rank == "1":
    while not os.path.exists("{folder}/ready-0"):
        time.sleep(0.01)
    os.kill(os.getppid(), signal.SIGTERM)
while True:
    signal.pause()
"""


@pytest.mark.parametrize(
    ("stuck", "activity", "overdue"),
    [(1, "Evaluating", False), (0, "Evaluating", False), (1, "Training", False), (0, "Training", True)],
)
def test_of_ranks_that_were_told_to_stop_none_waits_for_one_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: int, activity: str, overdue: bool
) -> None:
    """Only the first one, while it trains, may have something to save: it has the whole grace period."""
    monkeypatch.setattr(process, "LEAVE_SECONDS", 0.2)
    code = STUCK.format(stuck=stuck, activity=activity, folder=tmp_path)
    environs = [{**os.environ, "RANK": str(rank)} for rank in range(2)]
    with Stop() as stop:
        patience = Patience(60, 60, 2.0 if overdue else 60)
        ended = run_workers([sys.executable, "-c", code], environs, tmp_path, patience, stop)
    assert (ended.told_to_stop, ended.stop_overdue) == (True, overdue)
    assert ended.rank == 0
    assert ended.returncode == (-signal.SIGKILL if stuck == 0 else -signal.SIGTERM)


SPEC: dict[str, Any] = {
    "method": {"type": "QLoRA", "lora": {"rank": 4, "dropout": 0.2}},
    "training": {"length": {"steps": 60}, "microBatchSequences": 2},
    "recovery": {"checkpoint": {"interval": {"steps": 5}}},
}


@pytest.fixture(autouse=True)
def _nothing_stays() -> Iterator[None]:
    yield
    kill_all()


@pytest.fixture
def job(s3: Any, tiny_model: Path, tmp_path: Path) -> PreparedJob:
    return prepare_job(s3, tmp_path, tiny_model, **SPEC)


@pytest.mark.timeout(600)
def test_after_any_kills_the_adapter_is_the_same_bytes(job: PreparedJob) -> None:
    assert pod_of(job).start().wait() == 0
    undisturbed = adapter(job)
    forget_the_result(job)

    # kill -9 of the whole pod
    pod = pod_of(job).start()
    pod.until_step(12)
    pod.kill()
    assert steps(pod.lines)[0] == 1

    # kill -9 of the process that trains: it goes on in the same pod
    pod = pod_of(job).start()
    pod.until_step(24)
    os.kill(pod.worker(), signal.SIGKILL)
    pod.until(lambda lines: "Starting again in this pod" in "\n".join(lines))
    made = steps(pod.lines)
    pod.until(lambda lines: len(steps(lines)) > len(made) + 8)
    again = steps(pod.lines)[len(made)]
    assert made[0] in (6, 11), "from a checkpoint"
    assert 10 <= again <= made[-1] + 1

    # SIGTERM of the pod: it saves the last whole step and leaves with its own exit code
    pod.process.send_signal(signal.SIGTERM)
    assert pod.wait() == FAILURES[Reason.INTERRUPTED].exit_code
    assert pod.report.reason == Reason.INTERRUPTED
    last = steps(pod.lines)[-1]
    assert f"checkpoint saved at step {last}" in pod.report.message
    assert max(m.step for m in markers(job).values()) == last
    assert not job.context().output_store().exists("adapter/adapter_model.safetensors")

    pod = pod_of(job).start()
    assert pod.wait() == 0
    assert steps(pod.lines)[0] == last + 1, "nothing is computed again"
    assert adapter(job) == undisturbed
    assert result(job).execution_id == pod.execution


def test_there_are_as_many_ranks_as_the_pod_has_gpus(job: PreparedJob, tmp_path: Path) -> None:
    done = StageReport(
        stage="train", succeeded=True, reason="Succeeded", message="done", result=train_report().to_json_dict()
    )
    code = f"""
import os, pathlib
pathlib.Path("{tmp_path}", "rank-" + os.environ["FINETUNE_RANK"] + "-of-" + os.environ["FINETUNE_RANKS"]).touch()
open(os.environ["FINETUNE_OUTCOME"], "w").write({done.model_dump_json(by_alias=True)!r})
"""
    environ = {**os.environ, ENV_GPUS_PER_NODE: "3"}
    supervisor.run(job.context(), command=[sys.executable, "-c", code], environ=environ)
    assert sorted(p.name for p in tmp_path.glob("rank-*")) == ["rank-0-of-3", "rank-1-of-3", "rank-2-of-3"]


def test_status_is_told_what_was_changed_when_memory_ran_out(job: PreparedJob) -> None:
    done = StageReport(
        stage="train", succeeded=True, reason="Succeeded", message="done", result=train_report().to_json_dict()
    )
    code = f"""
import json, os, sys
os.write(int(os.environ["FINETUNE_HEARTBEAT_FD"]), b"Training\\n")
again = json.loads(os.environ["FINETUNE_RESTARTS"])
open(os.environ["FINETUNE_OUTCOME"], "w").write({done.model_dump_json(by_alias=True)!r} if again else {REPORT!r})
sys.exit(0 if again else 40)
"""
    ctx = job.context()
    assert supervisor.run(ctx, command=[sys.executable, "-c", code]) == train_report()
    [told] = [post for post in posts(ctx) if "restarts" in post]
    split = told["split"]
    assert isinstance(split, Split)
    whole, planned = job.snapshot.spec.training.global_batch_sequences, job.snapshot.split
    assert split.micro_batch_sequences == planned.micro_batch_sequences // 2
    assert split.micro_batch_sequences * split.gradient_accumulation_steps == whole


@pytest.mark.timeout(600)
def test_a_hung_process_is_started_again(job: PreparedJob) -> None:
    hung = job.with_spec(recovery={"hungTimeoutSeconds": 20})
    rewrite_prepared(job, hung)
    pod = pod_of(hung).start()
    pod.until_step(7)
    os.kill(pod.worker(), signal.SIGSTOP)
    pod.until(lambda lines: "Hung" in "\n".join(lines) or "no sign of life" in "\n".join(lines))
    assert pod.wait() == 0, pod.log
    assert [r.reason for r in result(hung).restarts] == ["Hung"]
    assert len(result(hung).resumed_from_steps) == 1


@pytest.mark.timeout(600)
@pytest.mark.parametrize("ranks", [1, 2])
def test_out_of_memory_heals_in_the_same_pod(s3: Any, tiny_model: Path, tmp_path: Path, ranks: int) -> None:
    """The last whole step is kept, and training goes on from it with a smaller split."""
    lora = {"type": "LoRA", "lora": {"rank": 4, "dropout": 0.0}}
    training = {"length": {"steps": 8}, "globalBatchSequences": 4, "microBatchSequences": 2}
    job = prepare_job(s3, tmp_path, tiny_model, method=lora, training=training, compute={"gpusPerNode": ranks})
    pod = pod_of(job, **{ENV_MOST_ROWS: "1"}).start()
    assert pod.wait(500) == 0, pod.log
    made = result(job)
    assert [r.reason for r in made.restarts] == ["OutOfMemory"], pod.log
    assert made.split is not None
    assert (made.split.micro_batch_sequences, made.split.gradient_accumulation_steps) == (1, 4 // ranks)
    assert set(made.resumed_from_steps) == {4}, "from the last step, not from the last interval"
    assert steps(pod.lines) == [1, 2, 3, 4, 5, 6, 7, 8]
    store = job.context().workspace_store()
    assert store.get_model("train/split.json", Split) == made.split


def rewrite_prepared(job: PreparedJob, changed: PreparedJob) -> None:
    """The same prepared data for another spec."""
    store = job.context().workspace_store()
    stored = json.loads(store.get_bytes("prepare/result.json"))
    stored["snapshotDigest"] = changed.snapshot.digest()
    store.put_bytes("prepare/result.json", json.dumps(stored).encode())


def test_a_supervisor_that_dies_takes_its_process_along(job: PreparedJob) -> None:
    pod = pod_of(job).start()
    pod.until_step(2)
    worker = pod.worker()
    os.kill(pod.process.pid, signal.SIGKILL)
    pod.wait()
    gone = threading.Event()

    def watch() -> None:
        while Path(f"/proc/{worker}").exists() and "Z" not in Path(f"/proc/{worker}/stat").read_text().split()[2]:
            time.sleep(0.05)
        gone.set()

    threading.Thread(target=watch, daemon=True).start()
    assert gone.wait(10)


def test_the_grace_period_bounds_the_saving(job: PreparedJob) -> None:
    """A process that is stuck when told to stop is not waited for longer than Kubernetes waits."""
    pod = pod_of(job, **{ENV_GRACE_SECONDS: "4"})
    assert isinstance(pod, TrainPod)
    pod.start()
    pod.until_step(2)
    os.kill(pod.worker(), signal.SIGSTOP)
    began = time.monotonic()
    pod.process.send_signal(signal.SIGTERM)
    assert pod.wait() == FAILURES[Reason.INTERRUPTED].exit_code
    assert time.monotonic() - began < 30
    assert "not done within the grace period" in pod.report.message
