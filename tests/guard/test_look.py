"""What a check sees of a run: whether adaptation harms for longer than the next steps."""

from types import SimpleNamespace

import pytest

from lightning_maml_guard.guard.look import Look
from lightning_maml_guard.lookahead.results import LookaheadResult

HARMS = SimpleNamespace(before=1.9, after=3.4, harmful=True, diverges_at=1, gain=-0.6)
HELPS = SimpleNamespace(before=1.9, after=1.0, harmful=False, diverges_at=None, gain=0.6)


@pytest.mark.parametrize(
    ("adaptation", "losses", "harmful"),
    [
        (HARMS, (3.4, 2.5, 1.4), False),  # the next steps take the loss below that without adaptation
        (HARMS, (3.4, 3.0, 2.5), True),
        (HARMS, (3.4, 1.2, float("nan")), True),
        (HARMS, None, True),
        (HELPS, (1.0, 1.1, 1.2), False),
        (None, (1.0, 1.1, 1.2), False),
    ],
)
def test_adaptation_is_harmful_unless_the_next_steps_mend_it(adaptation, losses, harmful):
    present = None if losses is None else LookaheadResult(losses)
    look = Look(None, [], [], present=present, adaptation=adaptation, alpha=0.4, representative=True)
    assert look.stays_harmful == harmful and bool(look.findings) == harmful
    assert look.harmful == (adaptation is HARMS)


def test_few_tasks_do_not_tell_whether_the_next_steps_mend_adaptation():
    look = Look(None, [], [], present=LookaheadResult((3.4, 2.5, 1.4)), adaptation=HARMS, alpha=0.4)
    assert look.stays_harmful and look.findings
