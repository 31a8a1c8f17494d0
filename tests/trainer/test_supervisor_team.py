"""Which pod's end took the others along, and what follows from it."""

from __future__ import annotations

import pytest

from finetune_api.failures import MAX_RESTARTS, Reason
from finetune_api.progress import Split, StageReport
from finetune_trainer.supervisor.decide import Again, Ended, Failed, Limits, Succeeded, Tally, decide, first_cause
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


def test_another_pods_interruption_starts_all_again_and_is_never_too_much() -> None:
    ended = first_cause(AGREED, {1: STOPPED, 2: AGREED}, [])
    assert ended.pod_stopped == 1
    tally = Tally({Reason.INTERRUPTED: 50, Reason.RANK_FAILURE: MAX_RESTARTS - 1})
    again = decide(ended, SPLIT, LIMITS, tally)
    assert isinstance(again, Again)
    assert (again.reason, again.split) == (Reason.INTERRUPTED, SPLIT)
    assert "Pod 1 was told to stop" in again.message
    assert isinstance(decide(first_cause(SYMPTOM, {}, [1]), SPLIT, LIMITS, tally), Again)


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
