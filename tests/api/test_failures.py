"""The failure table: whole, unambiguous, and usable as Job exit codes."""

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
