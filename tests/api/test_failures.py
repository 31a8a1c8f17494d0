"""The failure table: whole, unambiguous, and usable as Job exit codes."""

from pathlib import Path

from finetune_api.failures import FAILURES, PERMANENT_EXIT_CODES, Consequence, Reason, by_exit_code
from finetune_api.names import Stage


def test_every_reason_has_a_row_with_advice() -> None:
    assert set(FAILURES) == set(Reason)
    assert all(f.meaning.endswith(".") for f in FAILURES.values())
    assert all(f.advice_in(stage).endswith(".") for f in FAILURES.values() for stage in Stage)


def test_exit_codes_are_unique_and_valid() -> None:
    codes = [f.exit_code for f in FAILURES.values() if f.exit_code is not None]
    assert len(codes) == len(set(codes))
    assert all(1 <= c <= 125 for c in codes)


def test_exit_codes_lead_back_to_their_reason() -> None:
    for failure in FAILURES.values():
        if failure.exit_code is not None:
            assert by_exit_code(failure.exit_code) is failure


def test_signals_from_outside_are_interruptions_and_the_rest_is_unknown() -> None:
    assert all(by_exit_code(code).reason is Reason.INTERRUPTED for code in (130, 137, 143))
    assert by_exit_code(77).reason is Reason.UNKNOWN


def test_permanent_codes_are_exactly_those_that_repeating_cannot_help() -> None:
    assert set(PERMANENT_EXIT_CODES) == {
        f.exit_code for f in FAILURES.values() if f.consequence is Consequence.FAIL and f.exit_code is not None
    }


PROOFS: dict[Reason, str] = {
    Reason.INVALID_CONFIG: "operator/test_bad_input.py",
    Reason.INVALID_DATA: "e2e/test_bad_input.py",
    Reason.TOO_FEW_ROWS: "e2e/test_bad_input.py",
    Reason.DATASET_NOT_FOUND: "e2e/test_bad_input.py",
    Reason.MODEL_NOT_FOUND: "e2e/test_bad_input.py",
    Reason.BUCKET_NOT_FOUND: "e2e/test_bad_input.py",
    Reason.ACCESS_DENIED: "e2e/test_bad_input.py",
    Reason.GATED_MODEL: "e2e/test_bad_input.py",
    Reason.UNSUPPORTED_MODEL: "trainer/test_prepare_model_sources.py",
    Reason.UNKNOWN_TARGET_MODULE: "e2e/test_bad_input.py",
    Reason.CHAT_TEMPLATE_MISSING: "trainer/test_prepare_bad_input.py",
    Reason.NO_GPU: "e2e/test_job.py",
    Reason.NON_FINITE_LOSS: "trainer/test_train_trainer.py",
    Reason.VERIFICATION_FAILED: "trainer/test_train_teeth.py",
    Reason.DIVERGED: "trainer/test_train_failures.py",
    Reason.USER_CODE: "trainer/test_train_failures.py",
    Reason.DOES_NOT_FIT: "trainer/test_prepare_plan.py",
    Reason.OUT_OF_MEMORY: "trainer/test_train_resume.py",
    Reason.DISK_FULL: "trainer/test_train_failures.py",
    Reason.HUNG: "trainer/test_supervisor_process.py",
    Reason.RANK_FAILURE: "trainer/test_train_failures.py",
    Reason.SUPERSEDED: "trainer/test_train_resume.py",
    Reason.INTERRUPTED: "trainer/test_supervisor_process.py",
    Reason.UNKNOWN: "trainer/test_supervisor_decide.py",
    Reason.STORAGE_UNAVAILABLE: "trainer/test_base_s3_faults.py",
    Reason.STORAGE_FULL: "trainer/test_base_s3_uploads.py",
    Reason.HUB_UNAVAILABLE: "trainer/test_prepare_healing.py",
    Reason.SECRET_MISSING: "e2e/test_bad_input.py",
    Reason.PODS_MISSING: "trainer/test_train_nodes.py",
    Reason.IMAGE_UNAVAILABLE: "e2e/test_bad_input.py",
    Reason.UNSCHEDULABLE: "e2e/test_bad_input.py",
    Reason.VOLUME_UNAVAILABLE: "operator/test_bad_input.py",
    Reason.NODE_LOST: "e2e/test_node_lost.py",
    Reason.HOST_OUT_OF_MEMORY: "e2e/test_memory.py",
    Reason.EVICTED: "operator/test_planner_recovery.py",
    Reason.PREEMPTED: "e2e/test_recovery.py",
    Reason.DEADLINE_EXCEEDED: "e2e/test_lifecycle.py",
    Reason.PENDING_TIMEOUT: "e2e/test_bad_input.py",
    Reason.NAME_CONFLICT: "operator/test_lifecycle.py",
    Reason.ADMISSION_REFUSED: "operator/test_bad_input.py",
}
"""Where each failure is brought about."""


def test_every_reason_is_brought_about_by_a_test() -> None:
    assert set(PROOFS) == set(Reason)
    root = Path(__file__).resolve().parents[1]
    for reason, path in PROOFS.items():
        text = (root / path).read_text()
        assert f"Reason.{reason.name}" in text or f'"{reason.value}"' in text, (reason, path)
