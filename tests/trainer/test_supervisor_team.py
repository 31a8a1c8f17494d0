"""Which pod's end took the others along, and what follows from it."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from finetune_api.failures import MAX_FRUITLESS, MAX_RESTARTS, Reason
from finetune_api.progress import Split, StageReport
from finetune_trainer.errors import StageError
from finetune_trainer.supervisor.decide import Again, Ended, Failed, Limits, Succeeded, Tally, decide, first_cause
from finetune_trainer.supervisor.line import Line
from finetune_trainer.supervisor.place import Place
from finetune_trainer.supervisor.process import Patience, Stop
from finetune_trainer.supervisor.team import MOST_STRANGERS, Follower, Leader, wait_for
from tests.operator.manifests import train_report

SPLIT = Split(
    micro_batch_sequences=4, gradient_accumulation_steps=2, gradient_checkpointing=True, max_sequence_tokens=512
)
LIMITS = Limits((), 16, 2)


def told(reason: Reason, code: int = 1, **fields: object) -> Ended:
    report = StageReport(stage="train", succeeded=False, reason=reason, message=f"it was {reason}")
    return Ended(code, report, **fields)  # type: ignore[arg-type]


SYMPTOM = told(Reason.RANK_FAILURE)
GONE_ALONG = Ended(-9, aborted=True)
OUT_OF_DISK = told(Reason.DISK_FULL)
KILLED = Ended(-11)
HUNG = Ended(-9, silent_seconds=1800.0)
STOPPED = told(Reason.INTERRUPTED, 60, told_to_stop=True)
AGREED = told(Reason.INTERRUPTED, 60)
GOOD = Ended(
    0, StageReport(stage="train", succeeded=True, reason="Succeeded", message="", result=train_report().to_json_dict())
)


@pytest.mark.parametrize(
    ("local", "others", "cause"),
    [
        (SYMPTOM, {1: OUT_OF_DISK}, OUT_OF_DISK),
        (OUT_OF_DISK, {1: SYMPTOM}, OUT_OF_DISK),
        (GONE_ALONG, {1: SYMPTOM, 2: KILLED}, KILLED),
        (GONE_ALONG, {2: SYMPTOM, 1: GONE_ALONG}, SYMPTOM),
        (HUNG, {1: GONE_ALONG}, HUNG),
        (KILLED, {1: OUT_OF_DISK}, OUT_OF_DISK),
        (SYMPTOM, {1: GONE_ALONG}, SYMPTOM),
        (GOOD, {1: KILLED}, GOOD),
        (STOPPED, {1: OUT_OF_DISK}, STOPPED),
    ],
)
def test_a_cause_is_told_from_what_it_brought_about(local: Ended, others: dict[int, Ended], cause: Ended) -> None:
    assert first_cause(local, others, []) == cause


def test_a_pod_that_is_gone_is_the_cause_unless_another_had_its_own() -> None:
    assert first_cause(SYMPTOM, {}, [2]).pod_lost == 2
    assert first_cause(GONE_ALONG, {1: GONE_ALONG}, [2]).pod_lost == 2
    assert first_cause(SYMPTOM, {1: OUT_OF_DISK}, [2]) == OUT_OF_DISK


def test_another_pods_interruption_starts_all_again_unless_it_never_ends() -> None:
    ended = first_cause(AGREED, {1: STOPPED, 2: AGREED}, [])
    assert ended.pod_stopped == 1
    tally = Tally({Reason.INTERRUPTED: MAX_FRUITLESS - 1, Reason.RANK_FAILURE: MAX_RESTARTS - 1})
    again = decide(ended, SPLIT, LIMITS, tally)
    assert isinstance(again, Again)
    assert (again.reason, again.split) == (Reason.INTERRUPTED, SPLIT)
    assert "Pod 1 was told to stop" in again.message
    assert isinstance(decide(first_cause(SYMPTOM, {}, [1]), SPLIT, LIMITS, tally), Again)
    failed = decide(ended, SPLIT, LIMITS, Tally({Reason.INTERRUPTED: MAX_FRUITLESS}))
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.INTERRUPTED


def test_pods_that_vanish_again_and_again_end_the_execution() -> None:
    failed = decide(first_cause(SYMPTOM, {}, [1]), SPLIT, LIMITS, Tally({Reason.RANK_FAILURE: MAX_RESTARTS}))
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.RANK_FAILURE
    assert "pod 1 is gone" in failed.message


def test_the_first_pods_own_interruption_and_success_are_its_own() -> None:
    failed = decide(first_cause(STOPPED, {}, [1]), SPLIT, LIMITS, Tally())
    assert isinstance(failed, Failed)
    assert failed.reason is Reason.INTERRUPTED
    assert isinstance(decide(first_cause(GOOD, {1: GONE_ALONG}, []), SPLIT, LIMITS, Tally()), Succeeded)


@pytest.fixture
def leader() -> Iterator[Leader]:
    """The first of two pods; the other one is played."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    leader = Leader(Place(2, 0, 1, "localhost", port), "key", 5.0, lambda _: None, dict)
    yield leader
    leader.close()


def connect(leader: Leader) -> socket.socket:
    return socket.create_connection(("localhost", leader._place.port), timeout=10)


def test_a_node_that_lost_its_power_is_gone_within_a_minute() -> None:
    """It says nothing, and nobody says it for it: the kernel breaks the connection, whether something was sent or not."""
    with socket.create_server(("localhost", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        Line(connection)

        def option(name: int) -> int:
            return connection.getsockopt(socket.IPPROTO_TCP, name)

        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        tries = option(socket.TCP_KEEPCNT) * option(socket.TCP_KEEPINTVL)
        assert option(socket.TCP_KEEPIDLE) + tries <= 60
        assert 0 < option(socket.TCP_USER_TIMEOUT) <= 60_000


def hear(leader: Leader, until: Callable[[], bool]) -> None:
    while not until():
        wait_for(leader, time.monotonic() + 5)
        leader.heard()


def test_the_first_pods_only_rank_is_named_too(leader: Leader, tmp_path: Path) -> None:
    """Where every pod has one rank, nobody knows which process "the training process" is."""
    aborted = b'{"ended": {"returncode": -9, "aborted": true, "rank": 1}}\n'
    with connect(leader) as pod, Stop() as stop:
        pod.sendall(b'{"index": 1, "key": "key"}\n')

        def follow() -> None:
            if any(json.loads(line).get("do") == "stop" for line in pod.makefile()):
                pod.sendall(aborted)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        dies = [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]
        ended = leader.run(dies, os.environ, tmp_path, Patience(60, 60, 60), stop)
        thread.join(5)
    decision = decide(ended, SPLIT, LIMITS, Tally())
    assert isinstance(decision, Again)
    assert "the training process of rank 0 was ended by SIGKILL" in decision.message


@pytest.mark.parametrize(
    "noise", [b"[" * 60_000 + b"\n", b"GET / HTTP/1.1\r\n\r\n", b'{"index": 1}\n', b'{"index": 7, "key": "key"}\n']
)
def test_whoever_is_none_of_the_runs_pods_is_hung_up_on_and_changes_nothing(leader: Leader, noise: bytes) -> None:
    with connect(leader) as stranger, connect(leader) as pod:
        stranger.sendall(noise)
        pod.sendall(b'{"index": 1, "key": "key"}\n')
        hear(leader, lambda: not leader._missing())
        assert json.loads(pod.makefile().readline()) == {"do": "welcome"}
        stranger.shutdown(socket.SHUT_WR)
        hear(leader, lambda: len(leader._selector.get_map()) == 2)
        assert leader._missing() == []


def test_strangers_that_say_nothing_do_not_pile_up(leader: Leader) -> None:
    with ExitStack() as opened:
        for _ in range(MOST_STRANGERS + 10):
            opened.enter_context(connect(leader))
            wait_for(leader, time.monotonic() + 5)
            leader.heard()
        assert len(leader._selector.get_map()) <= 1 + MOST_STRANGERS


def test_a_pod_that_comes_again_before_its_old_connection_breaks_takes_its_place(leader: Leader) -> None:
    with connect(leader) as old, connect(leader) as new:
        old.sendall(b'{"index": 1, "key": "key"}\n')
        hear(leader, lambda: not leader._missing())
        first = leader._lines[1]
        new.sendall(b'{"index": 1, "key": "key"}\n')
        old.close()
        hear(leader, lambda: leader._lines.get(1) not in (None, first))
        assert first.closed


def test_who_is_hung_up_on_unheard_gives_up_in_time() -> None:
    with socket.create_server(("", 0)) as server, Stop() as stop:

        def hang_up() -> None:
            with suppress(OSError):
                while True:
                    server.accept()[0].close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        follower = Follower(Place(2, 1, 1, "localhost", server.getsockname()[1]), "key", 2.5, {})
        with pytest.raises(StageError, match="closed unheard") as given_up:
            follower._connect(stop)
        assert given_up.value.reason is Reason.PODS_MISSING
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
