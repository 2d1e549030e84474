"""RateFinder and apply: the rates are found where fit starts, set, and kept with the run."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR, OneCycleLR

from lightning_maml_guard import LadderOptions, MetaLearningModule, RateFinder, TaskDataModule, suggest_rates
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import LightningModule, MisconfigurationException, Trainer

QUICK = LadderOptions(steps=8, longest=8, alphas=(0.01, 0.04), progress=False)
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def groups(parameters):
    first, *others = parameters
    return SGD([{"params": [first], "lr": 0.02}, {"params": others}], lr=0.1)


def module(**options):
    torch.manual_seed(0)
    options = {"optimizer": groups, "inner_lr": 0.01, **options}
    return MetaLearningModule(mlp(hidden=(8,)), **options)


def data():
    return TaskDataModule(Sinusoid(shots=5), meta_batch_size=2, val_episodes=0)


@pytest.fixture(scope="module")
def found():
    return suggest_rates(module(), data(), batches=1, ladder=QUICK)


def test_the_run_trains_with_what_suggest_rates_finds(found, tmp_path):
    trained, finder = module(), RateFinder(batches=1, ladder=QUICK)
    trainer = Trainer(max_steps=2, callbacks=[finder], default_root_dir=tmp_path, **QUIET)
    trainer.fit(trained, data())
    assert finder.found.suggestion() == found.suggestion() and trained.inner_lr == found.alpha
    rates = [group["lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == pytest.approx([0.2 * found.beta, found.beta])  # in the groups' proportions
    assert (trained.hparams.inner_lr, trained.hparams.lr) == found.suggestion()
    # The checkpoint holds them, and a run that is resumed from it keeps them.
    (path,) = tmp_path.rglob("*.ckpt")
    again = MetaLearningModule.load_from_checkpoint(path, network=mlp(hidden=(8,)), optimizer=groups)
    assert again.inner_lr == found.alpha
    resumed = RateFinder(batches=1, ladder=QUICK)
    trainer = Trainer(max_steps=3, callbacks=[resumed], enable_checkpointing=False, **QUIET)
    trainer.fit(again, data(), ckpt_path=path)
    assert resumed.found is None
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == pytest.approx(rates)


def test_the_run_is_that_of_the_rates_set_by_hand(found):
    def trained(rates, callbacks):
        made = module(**rates)
        trainer = Trainer(max_steps=3, callbacks=callbacks, enable_checkpointing=False, **QUIET)
        torch.manual_seed(1)
        trainer.fit(made, data())
        return made.state_dict(), torch.rand(1)

    def by_hand(parameters):
        first, *others = parameters
        return SGD([{"params": [first], "lr": 0.2 * found.beta}, {"params": others}], lr=found.beta)

    one, drawn = trained({}, [RateFinder(batches=1, ladder=QUICK)])
    other, drawn_too = trained({"inner_lr": found.alpha, "optimizer": by_hand}, [])
    assert torch.equal(drawn, drawn_too) and all(torch.allclose(one[name], other[name]) for name in other)


@pytest.mark.parametrize("kept", [{"fast_dev_run": True}, {"barebones": True}])
def test_runs_that_are_no_training_keep_their_rates(kept):
    finder, quiet = RateFinder(ladder=QUICK), {} if "barebones" in kept else QUIET
    made = module()
    Trainer(max_steps=1, callbacks=[finder], **{**quiet, **kept}).fit(made, data())
    assert finder.found is None and made.inner_lr == 0.01


def test_several_processes_are_an_error():
    trainer = type("Many", (), {"ckpt_path": None, "fast_dev_run": False, "barebones": False, "world_size": 2})
    with pytest.raises(MisconfigurationException, match="in one process, .* but 2 train together. Call suggest_rates"):
        RateFinder().on_fit_start(trainer, module())


def test_where_nothing_is_suggested_the_rates_stay():
    made, finder = module(), RateFinder(batches=1, ladder=LadderOptions(steps=0))
    Trainer(max_steps=1, callbacks=[finder], enable_checkpointing=False, **QUIET).fit(made, data())
    assert math.isnan(finder.found.beta) and made.inner_lr == 0.01 and made.outer_lr is None


class Named(LightningModule):
    """A module that keeps its rates under names of its own."""

    def __init__(self, alpha=0.1, learning_rate=0.1):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.alpha = nn.Linear(1, 1), alpha


def test_apply_sets_the_names_of_a_foreign_module(found):
    named = Named()
    found.apply(named)
    assert named.alpha == named.hparams.alpha == found.alpha and named.hparams.learning_rate == found.beta
    other = Named()
    with pytest.raises(ValueError, match="Named or its hparams to hold 'eta' but neither does, so the suggested beta"):
        found.apply(other, beta="eta")
    assert other.alpha == 0.1


@pytest.mark.parametrize("rates", [{"learn_inner_lr": True}, {"inner_lr": [0.01, 0.02], "inner_steps": 2}, {}])
def test_apply_sets_every_kind_of_inner_rate(found, rates):
    made = module(**rates)
    found.apply(made)
    batch = next(iter(data().train_dataloader()))
    problem = made.meta_problem(batch)
    assert problem.alpha == pytest.approx(found.alpha)
    if "inner_steps" in rates:
        assert made.inner_lr == pytest.approx([found.alpha / 2, found.alpha])


def test_apply_sets_the_default_optimizer_and_what_a_schedule_starts_from(found):
    made = module(optimizer=None, lr_scheduler=lambda optimizer: LinearLR(optimizer, 0.1, 1.0, 10))
    found.apply(made)
    given = copy.deepcopy(made).configure_optimizers()
    assert given["lr_scheduler"].base_lrs == pytest.approx([found.beta])
    assert given["optimizer"].param_groups[0]["lr"] == pytest.approx(0.1 * found.beta)


def test_a_cyclic_schedules_own_number_is_named():
    cyclic = module(lr_scheduler=lambda optimizer: OneCycleLR(optimizer, 0.3, total_steps=50, cycle_momentum=False))
    found = suggest_rates(cyclic, data(), batches=1, ladder=QUICK)
    with pytest.raises(ValueError, match=r"sets the rate by its `max_lr`: pass max_lr=\S+ to it"):
        found.apply(cyclic)
    assert cyclic.inner_lr == 0.01


@pytest.mark.parametrize("wrong", [{"batches": 0}, {"margin": 1}, {"problem": 3}, {"ladder": 3}, {"curvature": 3}])
def test_bad_input_is_named(wrong):
    with pytest.raises((TypeError, ValueError), match=f"`{next(iter(wrong))}` to be"):
        RateFinder(**wrong)
