"""A failure that is told goes no further; what is no failure does."""

import pytest

from lightning_maml_guard.utils.warnings import GuardWarning, ReportedFailure


def test_a_failure_is_told_and_goes_no_further():
    told = []
    with ReportedFailure(told.append):
        raise ValueError("once")
    with ReportedFailure(told.append):
        pass
    assert [str(each) for each in told] == ["once"]


@pytest.mark.parametrize("error", [GuardWarning, KeyboardInterrupt])
def test_a_warning_made_an_error_and_an_interrupt_go_on(error):
    told = []
    with pytest.raises(error), ReportedFailure(told.append):
        raise error
    assert not told
