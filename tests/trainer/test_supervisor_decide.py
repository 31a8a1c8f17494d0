"""What follows when the training process has ended."""

from __future__ import annotations

import pytest

from finetune_api.failures import Reason
from finetune_api.names import Stage
from finetune_api.progress import Split, StageReport
from finetune_api.spec import OutOfMemoryAction as Action
from finetune_trainer.supervisor.decide import (
    MAX_RESTARTS,
    Again,
    Ended,
    Failed,
    Limits,
    Succeeded,
    Tally,
    decide,
    next_split,
)
from finetune_trainer.supervisor.run import placement_limit

ALL = tuple(Action)
SPLIT = Split(
    micro_batch_sequences=4, gradient_accumulation_steps=4, gradient_checkpointing=False, max_sequence_tokens=1024
)
LIMITS = Limits(ALL, 16)


def told(reason: Reason, message: str = "words", **result: object) -> StageReport:
    return StageReport(
        stage=Stage.TRAIN, succeeded=False, reason=reason, message=message, result=dict(result) if result else None
    )


def test_a_result_is_a_success_even_if_the_process_was_told_to_stop_meanwhile() -> None:
    report = StageReport(stage=Stage.TRAIN, succeeded=True, reason="Succeeded", message="", result={})
    assert decide(Ended(0, report, told_to_stop=True), SPLIT, LIMITS, Tally()) == Succeeded(report)


def test_out_of_memory_halves_the_micro_batch_then_checkpoints_then_shortens_then_fails() -> None:
    split, seen = SPLIT, []
    ended = Ended(40, told(Reason.OUT_OF_MEMORY, "tried to allocate 2 GiB", activity="Training"))
    for _ in range(10):
        found = decide(ended, split, LIMITS, Tally())
        if isinstance(found, Failed):
            break
        assert isinstance(found, Again)
        assert "tried to allocate 2 GiB" in found.message
        split = found.split
        seen.append(
            (
                split.micro_batch_sequences,
                split.gradient_accumulation_steps,
                split.gradient_checkpointing,
                split.max_sequence_tokens,
            )
        )
    assert seen == [
        (2, 8, False, 1024),
        (1, 16, False, 1024),
        (1, 16, True, 1024),
        (1, 16, True, 512),
        (1, 16, True, 256),
    ]
    assert isinstance(found, Failed)
    assert found.reason is Reason.OUT_OF_MEMORY


@pytest.mark.parametrize("global_batch", [1, 2, 3, 6, 7, 12, 16])
@pytest.mark.parametrize("micro", range(1, 17))
def test_the_global_batch_stays_exact(global_batch: int, micro: int) -> None:
    if global_batch % micro:
        return
    split = SPLIT.model_copy(
        update={"micro_batch_sequences": micro, "gradient_accumulation_steps": global_batch // micro}
    )
    found = next_split(split, Limits((Action.SMALLER_MICRO_BATCH,), global_batch))
    assert (found is None) == (micro == 1)
    if found is not None:
        smaller = found[0]
        assert smaller.micro_batch_sequences * smaller.gradient_accumulation_steps == global_batch
        assert smaller.micro_batch_sequences <= micro // 2


def test_only_what_is_allowed_is_changed() -> None:
    assert next_split(SPLIT, Limits((), 16)) is None
    found = next_split(SPLIT, Limits((Action.GRADIENT_CHECKPOINTING,), 16))
    assert found is not None
    assert found[0] == SPLIT.model_copy(update={"gradient_checkpointing": True})


def test_out_of_memory_while_evaluating_makes_evaluation_batches_smaller_and_nothing_else() -> None:
    found = decide(Ended(40, told(Reason.OUT_OF_MEMORY, activity="Evaluating")), SPLIT, LIMITS, Tally())
    assert isinstance(found, Again)
    assert found.split == SPLIT.model_copy(update={"evaluation_divisor": 2})


def test_out_of_memory_while_loading_cannot_be_helped() -> None:
    found = decide(Ended(40, told(Reason.OUT_OF_MEMORY, activity="Loading")), SPLIT, LIMITS, Tally())
    assert isinstance(found, Failed)
    assert found.reason is Reason.OUT_OF_MEMORY
    assert "Loading" in found.message


@pytest.mark.parametrize(
    ("ended", "reason"),
    [
        (Ended(-9, activity="Training"), Reason.RANK_FAILURE),
        (Ended(-11, activity="Loading"), Reason.RANK_FAILURE),
        (Ended(44, told(Reason.RANK_FAILURE, "DistBackendError: NCCL")), Reason.RANK_FAILURE),
        (Ended(-9, activity="Training", silent_seconds=1800.0), Reason.HUNG),
    ],
)
def test_a_process_that_dies_or_hangs_is_started_again_and_not_for_ever(ended: Ended, reason: Reason) -> None:
    tally = Tally()
    for _ in range(MAX_RESTARTS):
        found = decide(ended, SPLIT, LIMITS, tally)
        assert isinstance(found, Again)
        assert (found.reason, found.split) == (reason, SPLIT)
        tally.restarts[reason] = tally.restarts.get(reason, 0) + 1
    found = decide(ended, SPLIT, LIMITS, tally)
    assert isinstance(found, Failed)
    assert found.reason is reason


def test_out_of_memory_does_not_use_up_the_restarts_of_others() -> None:
    tally = Tally({Reason.OUT_OF_MEMORY: 5})
    assert isinstance(decide(Ended(-9), SPLIT, LIMITS, tally), Again)


def test_a_kill_for_the_containers_memory_is_told_apart_and_has_the_peak() -> None:
    found = decide(Ended(-9, activity="Training", memory_kills=1, peak_bytes=3 << 30), SPLIT, LIMITS, Tally())
    assert found == Failed(
        Reason.HOST_OUT_OF_MEMORY,
        "the training process was killed at 3.0 GiB for exceeding the container's memory limit",
    )


def test_a_stop_is_an_interruption_whatever_the_process_made_of_it() -> None:
    for ended in (
        Ended(60, told(Reason.INTERRUPTED, "checkpoint saved at step 7"), told_to_stop=True),
        Ended(-9, stop_overdue=True, told_to_stop=True),
        Ended(-15, told_to_stop=True),
        Ended(1, told(Reason.UNKNOWN), told_to_stop=True),
    ):
        found = decide(ended, SPLIT, LIMITS, Tally())
        assert isinstance(found, Failed)
        assert found.reason is Reason.INTERRUPTED


def test_what_repeating_in_the_pod_cannot_help_ends_the_pod() -> None:
    found = decide(Ended(22, told(Reason.NON_FINITE_LOSS, "nan")), SPLIT, LIMITS, Tally())
    assert found == Failed(Reason.NON_FINITE_LOSS, "nan")
    found = decide(Ended(3), SPLIT, LIMITS, Tally())
    assert isinstance(found, Failed)
    assert found.reason is Reason.UNKNOWN


def test_executions_that_wait_for_each_other_let_go_at_different_times() -> None:
    """Within half as long again as recovery.placementTimeoutSeconds, and never before it."""
    limits = [placement_limit(600) for _ in range(200)]
    assert all(600 <= limit <= 900 for limit in limits)
    assert max(limits) - min(limits) > 150
    assert len(set(limits)) == len(limits)
