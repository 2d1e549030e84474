"""Losses of any sign: what is a spike, what has diverged, what is rolled back. None of it by a ratio once one is <= 0."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pytorch_lightning import LightningModule
from torch import nn
from torch.optim import SGD, Adam

from lightning_maml_guard import ConvergenceGuard, LookaheadOptions
from lightning_maml_guard.guard.rescale import lowered, released
from lightning_maml_guard.guard.state import from_checkpoint
from lightning_maml_guard.lookahead.divergence import RunningStatistics, Scale, fails, passes, severity
from lightning_maml_guard.lookahead.lookahead import Caps
from lightning_maml_guard.lookahead.results import LookaheadResult
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.utils.lightning_compat import Trainer
from tests.helpers import QUIET, guard_warns

RATIO = 3.0


def verdicts(losses, ends, ratio=RATIO):
    """All that a guard decides on these losses: spikes, divergence, and of each lookahead whether it fails or passes."""
    seen, found = RunningStatistics(), []
    for loss, end in zip(losses, ends, strict=True):
        spiked = seen.update(loss)
        severe = seen.scale.severity(end)
        found.append((spiked, seen.scale.diverged(loss, ratio), fails(severe, ratio), passes(severe, ratio)))
    return found


def jittered(losses, seed):
    """Without ties, which rounding decides."""
    noise = torch.randn(len(losses), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return [loss + 0.1 * float(each) for loss, each in zip(losses, noise, strict=True)]


SEQUENCES = st.lists(st.floats(-100, 100), min_size=1, max_size=40)


@given(SEQUENCES, st.integers(0, 2**30), st.floats(0, 1000), st.sampled_from([1.5, 3.0, 8.0]))
def test_a_constant_added_to_losses_that_begin_at_or_below_zero_changes_no_verdict(losses, seed, shift, ratio):
    losses, ends = jittered(losses, seed), jittered(losses[::-1], seed + 1)
    below = -losses[0]  # where the first loss comes to 0, beyond which it is compared by its ratio
    at = [loss + below for loss in losses], [loss + below for loss in ends]
    further = [loss - shift for loss in at[0]], [loss - shift for loss in at[1]]
    assert verdicts(*at, ratio) == verdicts(*further, ratio)


@given(SEQUENCES, st.floats(1.01, 20))
def test_a_finite_loss_at_or_below_the_start_has_never_diverged(losses, ratio):
    seen = RunningStatistics()
    for loss in losses:
        seen.update(loss)
        if loss <= seen.start:
            assert not seen.scale.diverged(loss, ratio)
            assert not fails(seen.scale.severity(loss), ratio) and not fails(
                seen.scale.completed_by([loss]).severity(loss), ratio
            )


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_a_loss_that_only_falls_calls_no_check_and_is_never_rolled_back(losses):
    """From above 0 through 0 to below, however fast."""
    seen = RunningStatistics()
    for loss in sorted(losses, reverse=True):
        assert not seen.update(loss) and not seen.scale.diverged(loss, RATIO)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=40), st.floats(1e-6, 1e7))
def test_positive_losses_are_judged_by_the_ratios_as_ever(losses, end):
    seen, mean, first, latest = RunningStatistics(), math.nan, [], []
    for loss in losses:
        if len(first) < 8 and (not first or loss <= 2.0 * first[0]):
            first.append(loss)
        start = sorted(first)[len(first) // 2] if len(first) % 2 else sum(sorted(first)[len(first) // 2 - 1 :][:2]) / 2
        assert seen.update(loss) == (loss > 2.0 * mean)
        counted = min([loss, max(latest, default=loss)])
        latest = [*latest, loss][-8:]
        mean = loss if math.isnan(mean) else 0.9 * mean + (1 - 0.9) * counted
        assert seen.scale.diverged(loss, RATIO) == (loss > RATIO * start) and seen.scale.unit is None
        assert seen.scale.severity(end) == math.log(end / start) == seen.scale.completed_by([loss, end]).severity(end)


@pytest.mark.parametrize("offset", [0.0, -0.5, -1000.0])
def test_noise_calls_hardly_any_check_and_a_loss_that_leaves_is_seen(offset):
    noise = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = RunningStatistics()
    spikes = sum(seen.update(offset + 0.2 * float(each) - 1e-4 * step) for step, each in enumerate(noise))
    assert spikes <= 3
    loss = offset
    for step in range(60):
        loss += 0.05 * 1.3**step
        spiked = seen.update(loss)
        if seen.scale.diverged(loss, RATIO):
            break
    assert spiked and loss - offset < 10  # 50 standard deviations


@pytest.mark.parametrize("odd", [10.0, 700.0, 1e9])
def test_one_odd_batch_moves_no_mean_and_a_loss_that_stays_does(odd):
    noise = torch.randn(60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    seen = RunningStatistics()
    for each in noise:
        seen.update(1.0 + 0.1 * float(each))
    mean = seen.loss
    assert seen.update(odd) and seen.loss == pytest.approx(mean, rel=0.1) and not seen.has_left_best
    assert not seen.update(1.0) and seen.loss == pytest.approx(mean, rel=0.1) and not seen.has_left_best
    for _ in range(8):
        seen.update(5.0)
    assert seen.loss > 3 * mean and seen.has_lost_half


def test_what_is_a_spike_below_zero():
    seen = RunningStatistics()
    for loss in (-1.0, -1.1, -0.9, -1.0, -1.1, -0.9, -1.0, -1.1, -0.9, -1.0):
        assert not seen.update(loss)
    assert (seen.scale.start, seen.scale.settled) == (-1.0, True) and seen.scale.unit == pytest.approx(4 * 0.1, abs=0.1)
    assert not seen.update(-0.9) and seen.update(0.0) and seen.update(math.nan)
    assert (
        not seen.scale.diverged(-0.5, RATIO)
        and seen.scale.diverged(1.0, RATIO)
        and seen.scale.diverged(math.inf, RATIO)
    )


def test_a_first_lookahead_of_a_loss_at_zero_is_measured_in_its_own_changes():
    healthy, leaving = (0.0, -0.1, 0.1, -0.2, 0.05, -0.1), (0.0, 0.1, 0.4, 1.6, 6.4, 25.6, 100.0)
    for start in (0.0, -0.1, 1e-9):
        at = Scale().completed_by([start, *healthy[1:]])
        assert at.start == start and passes(at.severity(0.05), RATIO)
        assert fails(Scale().completed_by([-abs(start), *leaving[1:]]).severity(100.0), RATIO)
    settled = Scale(2.0, None, settled=True)
    assert settled.completed_by([1.0, -5.0]) is settled
    assert math.isnan(severity(1.0, -1.0)) and math.isnan(severity(1.0, -1.0, 0.0))
    assert severity(2.0, -1.0, 1.5) == pytest.approx(math.log(3)) and severity(-4.0, -1.0, 1.5) == -math.inf
    assert severity(math.nan, -1.0, 1.5) == math.inf


REPORT = StabilityReport.unmeasured(Reason(Kind.NOT_MEASURED), alpha=0.1, beta=0.8)


def test_rates_are_lowered_and_released_by_the_same_distances():
    """Losses near -10, where 1.2 times the loss is an improvement that no healthy step brings."""
    scale = Scale(-9.0, 1.0, settled=True)

    def look(caps):
        beta = caps.beta or 0.8
        return LookaheadResult((-10.0, -10.0 - 0.1 * beta if beta <= 0.4 else 50.0))

    assert lowered(REPORT, Caps(), 1.0, look, loss=-10.0, reach_alpha=False, scale=scale) == Caps(None, 0.4)
    for cap, found in ((0.05, 0.1), (0.3, 0.3)):
        caps = Caps(None, cap)
        assert released(0.1, 0.8, caps, look(caps), look, scale=scale) == Caps(None, found)


def test_a_checkpoint_of_an_older_version_goes_on_with_losses_below_zero():
    old = {"version": 1, "statistics": {"first": [-1.0] * 8, "loss": -2.0, "norm": 1.0}}
    seen = from_checkpoint(old).statistics
    assert repr(seen.scale) == repr(Scale(-1.0, 0.0, settled=True))
    assert (
        not seen.update(-2.1)
        and not seen.update(-2.0)
        and not seen.update(-1.9)
        and not seen.scale.diverged(-1.9, RATIO)
    )
    new = from_checkpoint({"version": 1, "statistics": {"first": [1.0], "loss": 1.0, "norm": 1.0}}).statistics
    assert repr(new.scale) == repr(Scale(1.0))


class Density(LightningModule):
    """A Gaussian's log-likelihood: the loss falls below 0, and every batch moves it."""

    def __init__(self, optimizer):
        super().__init__()
        self.mean, self.log_scale = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.full((2,), -0.6))
        self.make = optimizer

    def training_step(self, batch, batch_idx):
        return (self.log_scale + 0.5 * ((batch - self.mean) / self.log_scale.exp()) ** 2).mean()

    def configure_optimizers(self):
        return self.make(self.parameters())


def trained(guard, steps, make, seed=0):
    x = 0.3 * torch.randn(steps, 32, 2, generator=torch.Generator().manual_seed(seed))
    module = Density(make)
    trainer = Trainer(max_steps=steps, callbacks=[guard] if guard else [], **QUIET)
    trainer.fit(module, torch.utils.data.DataLoader(list(x), batch_size=None))
    return module


def test_a_density_that_is_learned_is_checked_on_schedule_and_never_rolled_back():
    guard = ConvergenceGuard(
        every_n_steps=25, action="rescale", rollback=True, lookahead=LookaheadOptions(steps=3, batches=4)
    )
    make = lambda p: Adam(p, lr=2e-3)  # noqa: E731
    module = trained(guard, 200, make)
    assert {*range(0, 200, 25)} <= {report.step for report in guard.history}
    assert not guard.events and len(guard.severities) < 12
    assert "unsafe" not in {report.status for report in guard.history}
    plain = trained(None, 200, make)
    assert torch.equal(plain.log_scale, module.log_scale) and float(module.log_scale[0].detach()) < -0.8


def test_a_density_whose_rate_is_too_high_is_still_found():
    guard = ConvergenceGuard(every_n_steps=25, action="stop", lookahead=LookaheadOptions(steps=5, batches=4))
    with guard_warns(r"ConvergenceGuard: step \d+: beta = 3 is too large\. Set the optimizer's lr to \S+\."):
        trained(guard, 200, lambda p: SGD(p, lr=3.0))
    assert guard.stopped_step is not None


def stalls(losses):
    """The numbers of steps after which a run counts as one that does not learn."""
    seen = RunningStatistics()
    found = []
    for step, loss in enumerate(losses, 1):
        seen.update(loss)
        if seen.stalled:
            found.append(step)
    return found


def test_a_loss_that_does_not_fall_is_seen_when_as_many_steps_again_are_taken():
    assert stalls([3.0] * 70) == list(range(64, 71))  # before, it would be noise
    assert not stalls([3.0 * 0.97**step for step in range(300)])
    assert stalls([3.0 * 0.996**step for step in range(300)]) == list(range(64, 128))  # while little has fallen
    assert {64} == set(stalls([3.0 if step < 100 else 1.0 for step in range(256)])) & {64, 128, 256}
    noise = torch.randn(256, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert 256 in stalls([3.0 + 0.3 * float(each) for each in noise])
    # Shifted by a constant, below 0, it is the same.
    assert 256 in stalls([-3.0 + 0.3 * float(each) for each in noise])


def test_a_loss_that_has_fallen_by_half_may_stay_there():
    assert not {64, 128} & set(stalls([3.0 if step < 8 else 1.0 for step in range(128)]))
    assert {64, 128} <= set(stalls([3.0 if step < 8 else 2.5 for step in range(128)]))


def test_losses_that_are_not_finite_say_nothing_of_progress():
    seen = RunningStatistics()
    for loss in (3.0, math.nan, math.inf, 3.0):
        seen.update(loss)
    assert seen.steps == 2
