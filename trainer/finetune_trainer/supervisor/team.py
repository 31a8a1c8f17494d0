"""The supervisors of several pods that train together. The first pod's leads: it waits until all are there, has all start their ranks at
once, stops all when one fails, and decides alone what follows. No pod ever trains with fewer.

Why not torchrun's elastic agent: see docs/design/0002-nothing-is-lost.md and 0003-several-nodes.md.
"""

from __future__ import annotations

import logging
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from finetune_api.failures import Reason
from finetune_trainer.errors import Interrupted, StageError
from finetune_trainer.supervisor.decide import Ended, first_cause
from finetune_trainer.supervisor.line import Line, Message
from finetune_trainer.supervisor.place import Place, rank_environs
from finetune_trainer.supervisor.process import Patience, Stop, Word, run_workers

log = logging.getLogger(__name__)
ENDED = TypeAdapter(Ended)
DAY = 86_400.0
"""Ranks of other pods than the first wait for its ranks, which show whether anything hangs."""
FAREWELL_SECONDS = 30.0
"""For the other pods to stop their ranks and say how they ended."""
BEAT_SECONDS = 5.0
"""Between two signs of life that another pod passes on to the first."""
INTRODUCTION_SECONDS = 10.0
"""For the first pod to say that it knows another one."""
MOST_STRANGERS = 64
"""Connections that have not said who they are."""
RETRY_SECONDS = 1.0
"""Between two tries to reach the first pod: its name is known only when it has an address."""
Run = Mapping[str, str]


class Alone:
    """One pod."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._rounds = 0

    def run(self, command: Sequence[str], environ: Run, folder: Path, patience: Patience, stop: Stop) -> Ended:
        """Start the ranks, and stay until all have ended."""
        self._rounds += 1
        meeting = folder / f"rendezvous-{self._rounds}"
        meeting.unlink(missing_ok=True)
        environs = rank_environs(environ, self._place, f"file://{meeting}")
        return run_workers(command, environs, folder, patience, stop)

    def close(self) -> None:
        """Nobody else has to know."""


class Leader:
    """The first of several pods."""

    def __init__(
        self, place: Place, key: str, seconds: float, told: Callable[[str], None], given: Callable[[Run], Run]
    ) -> None:
        """
        Args:
            key: what the others must say to be let in: the run's own.
            seconds: how long the others are waited for.
            told: called with what is waited for, and with nothing when all are there.
            given: of the environment, what the ranks of other pods need to have too.
        """
        self._place, self._key, self._seconds, self._told, self._given = place, key, seconds, told, given
        self._server = listen(place.port)
        self._selector = selectors.EpollSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        self._lines: dict[int, Line] = {}
        self._ended: dict[int, Ended] = {}
        """How the ranks of other pods ended, in the order in which it was told."""
        self._lost: list[int] = []
        self._running = False

    def fileno(self) -> int:
        """Readable when another pod has said something."""
        return self._selector.fileno()

    def run(self, command: Sequence[str], environ: Run, folder: Path, patience: Patience, stop: Stop) -> Ended:
        """Start the ranks of all pods, and stay until all have ended.

        Raises:
            StageError: PodsMissing, if the others are not there in time.
            Interrupted: told to stop while they were waited for.
        """
        self._gather(stop)
        self._ended, self._lost, self._running = {}, [], True
        rendezvous = f"tcp://{self._place.host}:{free_port()}"
        for line in self._lines.values():
            line.send(do="start", rendezvous=rendezvous, environ=dict(self._given(environ)))
        environs = rank_environs(environ, self._place, rendezvous)
        local = run_workers(command, environs, folder, patience, stop, self)
        local = replace(local, rank=local.rank or 0)  # one of several also where it is this pod's only one
        if not local.told_to_stop:  # then there is no time: the others notice when this process has ended
            self._settle(failed=local.returncode != 0)
        self._running = False
        return first_cause(local, self._ended, self._lost)

    def heard(self) -> Word:
        """Take up what was said; what it means for this round."""
        for key, _ in self._selector.select(0):
            if key.data is None:
                self._let_in()
            else:
                self._take(key.data)
        failed = [ended for ended in self._ended.values() if ended.returncode != 0]
        if self._lost or not all(ended.interrupted for ended in failed):
            return Word.ABORT
        return Word.LEAVE if failed else Word.GO_ON

    def beat(self) -> None:
        """Whether anything hangs is judged here, so nobody else need know."""

    def close(self) -> None:
        """All is done: the others end well, too."""
        for line in self._lines.values():
            line.send(do="end")
            line.close()
        self._selector.close()
        self._server.close()

    def _missing(self) -> list[int]:
        return [index for index in range(1, self._place.nodes) if index not in self._lines]

    def _gather(self, stop: Stop) -> None:
        self.heard()
        due = time.monotonic() + self._seconds
        waited = ""
        while missing := self._missing():
            words = f"{len(missing)} of {self._place.nodes} pods are not there: {', '.join(map(str, missing))}"
            if words != waited:
                self._told(words)
                waited = words
            if not wait_for(self, due, stop):
                raise StageError(Reason.PODS_MISSING, f"after {self._seconds:.0f} s {words}")
            self.heard()
        if waited:
            self._told("")

    def _let_in(self) -> None:
        try:
            connection, _ = self._server.accept()
        except OSError as error:  # it has gone already
            log.warning("a connection could not be accepted: %s", error)
            return
        line = Line(connection)
        self._selector.register(line, selectors.EVENT_READ, (None, line))
        strangers = [key.data[1] for key in self._selector.get_map().values() if key.data and key.data[0] is None]
        for old in strangers[:-MOST_STRANGERS]:
            self._selector.unregister(old)
            old.close()

    def _take(self, data: tuple[int | None, Line]) -> None:
        index, line = data
        if line.closed:  # another one has just taken its place
            return
        fileno = line.fileno()
        for message in line.receive():
            if index is None:
                index = self._known(message)
                if index is None:
                    line.close()
                    break
                line.send(do="welcome")
                self._replace(index, line)
            elif "ended" in message:
                self._ended.setdefault(index, read_ended(message))
        if line.closed:
            self._selector.unregister(fileno)
            if index is not None and self._lines.get(index) is line:
                del self._lines[index]
                self._lose(index)
        elif data[0] != index:
            self._selector.modify(line, selectors.EVENT_READ, (index, line))

    def _known(self, message: Message) -> int | None:
        index = message.get("index")
        ours = message.get("key") == self._key and isinstance(index, int) and 0 < index < self._place.nodes
        if not ours:
            log.warning("a connection that is none of this run's pods was closed")
        return index if ours else None

    def _replace(self, index: int, line: Line) -> None:
        old = self._lines.get(index)
        if old is not None:  # its node is gone, and the connection does not show it yet
            self._selector.unregister(old)
            old.close()
            self._lose(index)
        self._lines[index] = line
        if self._running:
            self._ended.setdefault(index, Ended(returncode=1, aborted=True))  # its ranks are not in this round

    def _lose(self, index: int) -> None:
        if self._running and index not in self._ended:
            self._lost.append(index)

    def _settle(self, *, failed: bool) -> None:
        """Until every other pod has said how its ranks ended, or is gone. Where this round failed they are stopped first."""
        if failed:
            for line in self._lines.values():
                line.send(do="stop")
        due = time.monotonic() + FAREWELL_SECONDS
        while open_ends := [i for i in self._lines if i not in self._ended]:
            if not wait_for(self, due):
                for index in open_ends:
                    self._selector.unregister(self._lines[index])
                    self._lines.pop(index).close()
                    self._lose(index)
                return
            self.heard()


class Follower:
    """Another pod than the first: does as that says."""

    def __init__(self, place: Place, key: str, seconds: float, per_pod: Run) -> None:
        self._place, self._key, self._seconds, self._environ = place, key, seconds, per_pod
        self._line: Line | None = None
        self._said: list[Message] = []
        self._told = 0.0

    def fileno(self) -> int:
        """Readable when the first pod has said something."""
        assert self._line is not None
        return self._line.fileno()

    def heard(self) -> Word:
        """The ranks must end if the first pod says so, or is gone."""
        assert self._line is not None
        self._said += self._line.receive()
        over = self._line.closed or any(message.get("do") == "stop" for message in self._said)
        return Word.ABORT if over else Word.GO_ON

    def beat(self) -> None:
        """Told now and then: whether anything hangs is judged by the first pod."""
        now = time.monotonic()
        if self._line is not None and now - self._told >= BEAT_SECONDS:
            self._told = now
            self._line.send(beat=True)

    def follow(self, command: Sequence[str], folder: Path, stop_seconds: float, stop: Stop) -> None:
        """Until the first pod says that all is done.

        Raises:
            StageError: PodsMissing, if the first pod cannot be reached in time.
            Interrupted: told to stop.
        """
        patience = Patience(silence=DAY, start=DAY, stop=stop_seconds)
        while True:
            if self._line is None or self._line.closed:
                self._connect(stop)
            message = self._next(stop)
            if message.get("do") == "end":
                return
            if message.get("do") == "start":
                self._run(command, message, folder, patience, stop)

    def _run(self, command: Sequence[str], message: Message, folder: Path, patience: Patience, stop: Stop) -> None:
        environ = {**self._environ, **message["environ"]}
        environs = rank_environs(environ, self._place, message["rendezvous"])
        ended = run_workers(command, environs, folder, patience, stop, self)
        first = self._place.index * self._place.per_node
        assert self._line is not None
        self._line.send(ended=ENDED.dump_python(replace(ended, rank=first + (ended.rank or 0)), mode="json"))
        if ended.told_to_stop:
            self._line.close()
            raise Interrupted("told to stop (SIGTERM), and all ranks with it")

    def _next(self, stop: Stop) -> Message:
        """What the first pod says next; nothing if it is gone."""
        assert self._line is not None
        while not self._said:
            if self._line.closed:
                return {}
            wait_for(self._line, None, stop)
            self._said += self._line.receive()
        return self._said.pop(0)

    def _connect(self, stop: Stop) -> None:
        if self._line is not None:
            log.warning("the first pod is gone: waiting for the one that replaces it")
        due = time.monotonic() + self._seconds
        where = (self._place.host, self._place.port)
        problem: OSError | None = None
        while time.monotonic() < due:
            try:
                self._line = Line(socket.create_connection(where, timeout=RETRY_SECONDS))
            except OSError as error:
                problem = error
                wait_for(None, time.monotonic() + RETRY_SECONDS, stop)
                continue
            self._said = []
            self._line.send(index=self._place.index, key=self._key)
            if self._welcome(stop):
                return
            problem = OSError("the connection was closed unheard")
            wait_for(None, time.monotonic() + RETRY_SECONDS, stop)
        raise StageError(
            Reason.PODS_MISSING, f"after {self._seconds:.0f} s the first pod ({where[0]}) cannot be reached: {problem}"
        )

    def _welcome(self, stop: Stop) -> bool:
        """Whether who answers is this run's first pod."""
        assert self._line is not None
        due = time.monotonic() + INTRODUCTION_SECONDS
        while not self._said and not self._line.closed and wait_for(self._line, due, stop):
            self._said += self._line.receive()
        if not self._said:
            self._line.close()
        return bool(self._said)


def wait_for(what: Leader | Line | None, due: float | None, stop: Stop | None = None) -> bool:
    """Until it is readable; False if the time was over before.

    Raises:
        Interrupted: told to stop.
    """
    with selectors.DefaultSelector() as selector:
        for end in (what, stop):
            if end is not None:
                selector.register(end.fileno(), selectors.EVENT_READ, end)
        left = None if due is None else due - time.monotonic()
        if left is not None and left <= 0:
            return False
        ready = [key.data for key, _ in selector.select(left)]
    if stop is not None and stop.requested:
        raise Interrupted("told to stop (SIGTERM) while waiting for the other pods")
    return what in ready


def listen(port: int) -> socket.socket:
    """On every address, of both families where there are both."""
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def free_port() -> int:
    """One that nobody in this pod uses."""
    with socket.create_server(("", 0)) as server:
        port: int = server.getsockname()[1]
    return port


def read_ended(message: Message) -> Ended:
    """What a pod says of its ranks; what cannot be read is a failure without words."""
    try:
        return ENDED.validate_python(message["ended"])
    except ValidationError:
        return Ended(returncode=1)
