"""What follows when the training process has ended: pure."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from finetune_api.failures import FAILURES, MAX_FRUITLESS, MAX_RESTARTS, Reason, by_exit_code
from finetune_api.progress import Split, StageReport
from finetune_api.snapshot import largest_divisor, rank_share
from finetune_api.spec import OutOfMemoryAction
from finetune_trainer.memory import gibibytes

SHORTEST_TOKENS = 256
MOST_EVALUATION_DIVISOR = 16
EVALUATING = ("Evaluating", "Verifying")
TRAINING = "Training"
UNBOUNDED = (Reason.OUT_OF_MEMORY, Reason.INTERRUPTED)
SYMPTOMS = (Reason.UNKNOWN, Reason.RANK_FAILURE, Reason.INTERRUPTED)
"""What ranks report when another one's end took them along, among other things."""


@dataclass(frozen=True)
class Ended:
    """How a training process ended."""

    returncode: int
    """As subprocess tells it: negative for a signal."""
    report: StageReport | None = None
    """What it wrote before it ended, if it got that far."""
    activity: str = ""
    """What it last said that it did."""
    silent_seconds: float | None = None
    """It was ended because it had shown no sign of life for so long."""
    stop_overdue: bool = False
    """It was told to stop and did not within the grace period."""
    told_to_stop: bool = False
    memory_kills: int = 0
    """Processes of this container killed for its memory limit while it ran."""
    peak_bytes: int | None = None
    rank: int | None = None
    """Which of several processes."""
    aborted: bool = False
    """It was ended because another pod's had."""
    pod_stopped: int | None = None
    """It ended because another pod was told to stop: that one's index."""
    pod_lost: int | None = None
    """It ended because another pod is gone: that one's index."""

    @property
    def interrupted(self) -> bool:
        """It was told to stop, or agreed to with ranks that were."""
        return self.told_to_stop or (self.report is not None and self.report.reason == Reason.INTERRUPTED)

    @property
    def who(self) -> str:
        """For a sentence."""
        return "the training process" if self.rank is None else f"the training process of rank {self.rank}"


@dataclass(frozen=True)
class Limits:
    """What recovery allows."""

    actions: tuple[OutOfMemoryAction, ...]
    global_batch: int
    ranks: int = 1


@dataclass(frozen=True)
class Succeeded:
    """The stage is done."""

    report: StageReport


@dataclass(frozen=True)
class Failed:
    """The pod ends."""

    reason: Reason
    message: str
    result: dict[str, object] | None = None
    """How far it came, where it was told to stop."""


@dataclass(frozen=True)
class Again:
    """Another process starts in this pod."""

    reason: Reason
    message: str
    split: Split


@dataclass
class Tally:
    """Restarts in this pod so far, by reason."""

    restarts: dict[Reason, int] = field(default_factory=dict)

    def counted(self) -> int:
        """Those that are bounded: an out-of-memory error bounds itself, as every change is made once, and another pod's interruption came
        from outside."""
        return sum(n for reason, n in self.restarts.items() if reason not in UNBOUNDED)


def decide(ended: Ended, split: Split, limits: Limits, tally: Tally) -> Succeeded | Failed | Again:
    """What follows."""
    report = ended.report
    if ended.returncode == 0 and report is not None and report.succeeded:
        return Succeeded(report)
    if ended.told_to_stop:
        return _stopped(ended)
    if ended.pod_stopped is not None:
        if tally.restarts.get(Reason.INTERRUPTED, 0) >= MAX_FRUITLESS:
            return Failed(
                Reason.INTERRUPTED, f"pod {ended.pod_stopped} was told to stop, {MAX_FRUITLESS} times in a short while"
            )
        how = f" ({report.message})" if report is not None and ended.interrupted else ""
        return Again(
            Reason.INTERRUPTED, f"Pod {ended.pod_stopped} was told to stop, and all ranks with it{how}.", split
        )
    if ended.pod_lost is not None:
        return _bounded(Reason.RANK_FAILURE, f"pod {ended.pod_lost} is gone", split, tally)
    if ended.silent_seconds is not None:
        said = f"no sign of life for {ended.silent_seconds:.0f} s while {ended.activity or 'starting'}"
        return _bounded(Reason.HUNG, said, split, tally)
    if report is not None and not report.succeeded:
        reason = _known(report.reason)
        if reason is Reason.OUT_OF_MEMORY:
            return _out_of_memory(ended, report, split, limits)
        if reason is Reason.RANK_FAILURE:
            return _bounded(reason, report.message, split, tally)
        return Failed(reason, report.message)
    if ended.memory_kills:
        peak = f" at {gibibytes(ended.peak_bytes)}" if ended.peak_bytes else ""
        return Failed(
            Reason.HOST_OUT_OF_MEMORY,
            f"{ended.who} was killed{peak} for exceeding the container's memory limit",
        )
    if ended.returncode < 0:
        name = signal.Signals(-ended.returncode).name
        return _bounded(
            Reason.RANK_FAILURE,
            f"{ended.who} was ended by {name} while {ended.activity or 'starting'}",
            split,
            tally,
        )
    failure = by_exit_code(ended.returncode)
    if failure.reason is Reason.UNKNOWN:
        return Failed(Reason.UNKNOWN, f"{ended.who} ended with exit code {ended.returncode} and said nothing")
    return Failed(failure.reason, f"{failure.meaning} ({ended.who} could not write down more)")


def first_cause(local: Ended, others: Mapping[int, Ended], lost: Sequence[int]) -> Ended:
    """Of several pods' ends the one that took the others along.

    Args:
        local: of the first pod.
        others: of those that have told it, by index, in the order in which they did.
        lost: pods that are gone and have told nothing.
    """
    if local.told_to_stop or (local.returncode == 0 and not local.aborted):
        return local
    stopped = [index for index, ended in others.items() if ended.told_to_stop]
    if stopped:
        return replace(local, pod_stopped=stopped[0])
    failed = [ended for ended in (local, *others.values()) if ended.returncode != 0 and not ended.aborted]
    # What says why comes before a signal: NCCL's watchdog ends ranks with one when another rank is gone.
    causes = sorted((ended for ended in failed if is_cause(ended)), key=lambda ended: ended.report is None)
    if causes:
        return causes[0]
    if lost:
        return replace(local, pod_lost=lost[0])
    return failed[0] if failed else local


def is_cause(ended: Ended) -> bool:
    """Whether this can only be its own doing."""
    told = ended.report is not None and ended.report.reason not in SYMPTOMS
    return told or ended.returncode < 0 or ended.silent_seconds is not None or bool(ended.memory_kills)


def next_split(split: Split, limits: Limits) -> tuple[Split, str] | None:
    """The first change that is allowed and left to make, and how to say it; None when there is none."""
    for action in limits.actions:
        if action is OutOfMemoryAction.SMALLER_MICRO_BATCH and split.micro_batch_sequences > 1:
            share = rank_share(limits.global_batch, limits.ranks)
            micro = largest_divisor(share, split.micro_batch_sequences // 2)
            count = share // micro
            said = (
                f"with micro-batch {micro} × accumulation {count} instead of {split.micro_batch_sequences} × "
                f"{split.gradient_accumulation_steps}. Same global batch, same data order"
            )
            return split.model_copy(update={"micro_batch_sequences": micro, "gradient_accumulation_steps": count}), said
        if action is OutOfMemoryAction.GRADIENT_CHECKPOINTING and not split.gradient_checkpointing:
            said = "with gradient checkpointing. Same global batch, same data order"
            return split.model_copy(update={"gradient_checkpointing": True}), said
        if action is OutOfMemoryAction.SHORTER_SEQUENCES and split.max_sequence_tokens > SHORTEST_TOKENS:
            tokens = max(SHORTEST_TOKENS, split.max_sequence_tokens // 2)
            said = (
                f"with rows truncated at {tokens} tokens instead of {split.max_sequence_tokens}, as "
                "recovery.outOfMemory.actions allows"
            )
            return split.model_copy(update={"max_sequence_tokens": tokens}), said
    return None


def _known(reason: str) -> Reason:
    return Reason(reason) if reason in list(Reason) else Reason.UNKNOWN


def _stopped(ended: Ended) -> Failed:
    if ended.report is not None and ended.report.reason == Reason.INTERRUPTED:
        return Failed(Reason.INTERRUPTED, ended.report.message, ended.report.result)
    if ended.stop_overdue:
        return Failed(
            Reason.INTERRUPTED,
            f"told to stop (SIGTERM) while {ended.activity or 'starting'}, and not done within the grace period: what came after "
            "the last checkpoint is computed again. recovery.terminationGracePeriodSeconds gives it more time",
        )
    return Failed(Reason.INTERRUPTED, f"told to stop (SIGTERM) while {ended.activity or 'starting'}")


def _bounded(reason: Reason, message: str, split: Split, tally: Tally) -> Failed | Again:
    if tally.counted() >= MAX_RESTARTS:
        return Failed(reason, f"{message}, after {MAX_RESTARTS} restarts in this pod")
    return Again(reason, f"{FAILURES[reason].meaning} ({message})", split)


def _out_of_memory(ended: Ended, report: StageReport, split: Split, limits: Limits) -> Failed | Again:
    activity = str((report.result or {}).get("activity") or ended.activity)
    if activity in EVALUATING and split.evaluation_divisor < MOST_EVALUATION_DIVISOR:
        smaller = split.model_copy(update={"evaluation_divisor": 2 * split.evaluation_divisor})
        return Again(
            Reason.OUT_OF_MEMORY,
            f"Out of GPU memory while evaluating ({report.message}); evaluation batches are halved",
            smaller,
        )
    found = next_split(split, limits) if activity == TRAINING else None
    if found is None:
        return Failed(Reason.OUT_OF_MEMORY, f"while {activity or 'starting'}: {report.message}")
    smaller, said = found
    return Again(Reason.OUT_OF_MEMORY, f"Out of GPU memory ({report.message}); goes on {said}", smaller)
