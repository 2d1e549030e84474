"""What a run has learned, and whether it lost it: running losses, batches at earlier parameters, and whole runs."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, GuardWarning, MetaLearningModule
from lightning_maml_guard.lookahead.divergence import RunningStatistics, Scale, fails, passes
from lightning_maml_guard.lookahead.learning import Learning, chance_loss, highest_kept_losses, probe_indices
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.problems import PlainProblem
from tests.helpers import fit, guard_warns, one_line, quadratic_batch


def after(losses, chance=math.nan):
    seen = RunningStatistics(chance=chance)
    for loss in losses:
        seen.update(loss)
    return seen


def noise(count, seed=0):
    return torch.randn(count, generator=torch.Generator().manual_seed(seed)).tolist()


FALLING = [1.0 * 0.9**step + 0.1 for step in range(60)]


def test_half_of_what_was_learned_is_lost_long_before_three_times_the_start():
    seen = after(FALLING)
    assert not seen.has_lost_half and not seen.has_left_best and seen.near_best
    back = after([*FALLING, *[1.0] * 12])
    assert back.has_lost_half and not back.scale.diverged(1.0, 3.0) and not back.near_best
    assert not after([*FALLING, 1.0]).has_lost_half  # one batch


def test_noise_is_no_lost_learning():
    for seed in range(20):
        losses = [
            max(4.5 * 0.97**step + 2.0, 2.0) * math.exp(0.4 * each) for step, each in enumerate(noise(1000, seed))
        ]
        seen, lost = RunningStatistics(), 0
        for loss in losses:
            seen.update(loss)
            lost += seen.has_lost_half
        assert lost == 0


def test_a_classifier_falls_back_to_guessing_and_not_to_its_start():
    """It began worse than guessing, so that guessing again is hardly half of the way back to the start."""
    falling = [6.0 * 0.9**step + 0.4 for step in range(80)]
    guessing = [*falling, *[math.log(5)] * 15]
    assert after(guessing, math.log(5)).has_lost_half and not after(guessing).has_lost_half


def test_a_run_that_learned_nothing_has_nothing_to_lose():
    assert not after([*[1.0] * 60, *[1.4] * 30]).has_lost_half


def test_a_rise_counts_from_the_best_mean_and_only_on_the_same_batch():
    scale = after([5.0 * 0.9**step + 0.1 for step in range(80)]).scale
    assert scale.best == pytest.approx(0.1, abs=0.02) and scale.start > 3
    assert fails(scale.severity(4.0, 0.1), 3.0) and not fails(scale.severity(4.0), 3.0)
    assert passes(scale.severity(4.0, 4.0), 3.0)  # a batch that was as hard before
    assert Scale(1.0).severity(2.0, 0.5) == math.log(2.0)  # before anything was learned


@pytest.mark.parametrize(
    ("now", "lost", "holds"),
    [((0.2, 0.2, 0.3), False, True), ((0.9, 0.8, 0.9), True, False), ((9.0, 0.2, 0.2), False, True)],
)
def test_most_batches_decide(now, lost, holds):
    found = Learning(now, ((1.0, 1.0, 1.0), (0.2, 0.2, 0.2), (0.9, 0.9, 0.9)), 1.0, 3)
    assert (found.has_lost_half, found.does_as_well, found.good_snapshots) == (lost, holds, [1])
    assert found.losses[0] == 0.2 and found.losses[2] == 1.0


def test_tasks_that_are_harder_for_all_parameters_are_not_lost_learning():
    found = Learning((9.0, 9.1), ((10.0, 10.0), (9.0, 9.0)), 1.0, 2)
    assert not found.has_lost_half and found.does_as_well


def test_the_youngest_snapshot_that_lost_nothing_is_the_one_to_go_back_to():
    kept = ((1.0,), (0.3,), (0.2,), (0.25,), (0.8,))
    assert Learning((math.inf,), kept, 1.0, 5).good_snapshots == [3, 2, 1]
    assert Learning((math.inf,), ((math.inf,), (math.inf,)), 1.0, 2).good_snapshots == [1, 0]


def test_a_snapshot_that_has_seen_the_batches_is_not_what_the_run_is_compared_with():
    """It does better on them than a run that meets each for the first time, however well that is."""
    kept = ((1.0,), (0.6,), (0.1,))
    assert Learning((0.65,), kept, 1.0, 3).has_lost_half and not Learning((0.65,), kept, 1.0, 2).has_lost_half
    assert Learning((0.65,), kept, 1.0, 2).losses == (0.6, 0.65, 1.0)


def test_batches_to_compare_on_are_spread_out():
    assert probe_indices(1) == [0] and probe_indices(3) == [0, 1, 2] and probe_indices(8) == [0, 2, 4, 6]


@pytest.mark.parametrize(
    ("loss", "labels", "chance"),
    [
        (F.cross_entropy, torch.tensor([[0, 1, 4]]), math.log(5)),
        (None, torch.tensor([[0, 1, 4]]), math.log(5)),
        (F.mse_loss, torch.tensor([[0, 1, 4]]), math.nan),
        (None, torch.ones(1, 3), math.nan),
    ],
)
def test_the_loss_of_guessing_is_known_where_cross_entropy_is_trained(loss, labels, chance):
    module = MetaLearningModule(nn.Linear(2, 5), loss)
    assert chance_loss(module, ((torch.ones(1, 3, 2), labels),) * 2) == pytest.approx(chance, nan_ok=True)


BATCH = quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0)


class Forgetful(MetaLearningModule):
    """At some steps its parameters are those that training began from."""

    def __init__(self, *steps):
        self.steps = steps
        network = nn.Linear(4, 1, bias=False).double()
        nn.init.ones_(network.weight)
        super().__init__(network, inner_lr=0.05, order="simplified", optimizer=lambda p: SGD(p, lr=0.1))

    def on_train_batch_start(self, batch, batch_idx):
        if batch_idx in self.steps:
            with torch.no_grad():
                self.network.weight.fill_(1.0)


def test_a_run_that_learns_again_what_it_forgot_is_not_called_collapsed(recwarn):
    guard = ConvergenceGuard()
    fit(Forgetful(60), BATCH, 80, [guard])
    assert guard.advice is None and not [each for each in recwarn if each.category is GuardWarning]


def test_a_run_that_forgets_is_called_collapsed_and_is_rolled_back_a_few_steps():
    """The loss is back where it began, and never above: by ratios to the start nothing happened."""
    guard = ConvergenceGuard()
    with guard_warns(r"the run has collapsed: at least half of what it had learned is lost\. On the latest batches"):
        fit(Forgetful(*range(60, 80, 4)), BATCH, 80, [guard])
    assert any(report.status == "unsafe" for report in guard.history)
    guard, module = ConvergenceGuard(action="rescale"), Forgetful(60)
    with guard_warns(r"rolled back to step 56.*5 of 61 steps are lost"):
        trainer = fit(module, BATCH, 100, [guard])
    plain = fit(Forgetful(60), BATCH, 100)
    losses = [float(each.callback_metrics["train/loss"]) for each in (trainer, plain)]
    assert losses[0] < losses[1]
    (back,) = [one_line(str(event.reasons[0].steps)) for event in guard.events if event.kind == "rolled back"]
    assert back == "56"


def test_what_was_nearly_kept_is_told_batch_by_batch():
    """At the best snapshot, and a quarter of the way back to the start; the start is no higher than before training."""
    weight = nn.Linear(1, 1, bias=False)
    optimizer = SGD(weight.parameters(), lr=0.0)

    def square(above):
        return PlainProblem(dict(weight.named_parameters()), lambda p: p["weight"].square().sum() + above)

    kept = []
    for at in (2.0, 1.0, 0.0):
        nn.init.constant_(weight.weight, at)
        kept.append(Snapshot(weight, [optimizer], 8 * len(kept)))
    nn.init.constant_(weight.weight, 5.0)
    lookahead = Lookahead([square(1.0), square(10.0)], optimizer, 1)
    found = Learning((5.0,), ((4.0,), (1.0,), (0.0,)), 12.0, 2)  # the last one was made when the batches had been used
    assert highest_kept_losses(found, lookahead, weight, [optimizer], kept) == pytest.approx(
        (2 + 0.25 * 3, 11 + 0.25 * 1)
    )
    assert weight.weight.item() == 5.0
