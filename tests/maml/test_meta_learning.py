import math

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader
from torchmetrics import MeanSquaredError, MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from lightning_maml_guard import EpisodeBatch, GuardWarning, MetaLearningModule, TaskDataModule
from lightning_maml_guard.maml.evaluation import EpisodeMean
from lightning_maml_guard.maml.inner_rates import select
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import Trainer, seed_everything
from tests.helpers import fit

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def sinusoids(**arguments):
    return TaskDataModule(
        Sinusoid(),
        **{"meta_batch_size": 8, "steps_per_epoch": 20, "val_episodes": 10, "test_episodes": 12, **arguments},
    )


def plain_training(steps, order):
    """Finn et al.'s algorithm in a loop, with torch.optim and no Lightning."""
    seed_everything(1)
    network = mlp()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    batches = sinusoids().train_dataloader().dataset
    for step in range(steps):
        (xs, ys), (xq, yq) = batches[step]
        loss = 0.0
        for task in range(8):
            params = dict(network.named_parameters())
            inner = nn.functional.mse_loss(torch.func.functional_call(network, params, (xs[task],)), ys[task])
            gradients = torch.autograd.grad(inner, list(params.values()), create_graph=order == "exact")
            adapted = {n: p - 0.01 * g for (n, p), g in zip(params.items(), gradients, strict=True)}
            loss = (
                loss + nn.functional.mse_loss(torch.func.functional_call(network, adapted, (xq[task],)), yq[task]) / 8
            )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


@pytest.mark.parametrize("order", ["exact", "first"])
def test_training_follows_a_plain_maml_loop(order):
    reference = plain_training(20, order)
    seed_everything(1)
    module = MetaLearningModule(mlp(), order=order)
    Trainer(max_epochs=1, enable_checkpointing=False, **QUIET).fit(module, sinusoids(val_episodes=0))
    for found, expected in zip(module.network.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)


def test_validation_test_and_loading_work(tmp_path):
    module = MetaLearningModule(mlp(), inner_lr=0.02, inner_steps=1, eval_inner_steps=3, metrics=MeanSquaredError())
    trainer = Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    data = sinusoids()
    trainer.fit(module, data)
    validated = trainer.validate(module, data, verbose=False)[0]
    tested = trainer.test(module, data, verbose=False)[0]
    assert set(tested) == {
        f"test/{n}{s}"
        for n in ("loss", "loss_before", "meansquarederror", "meansquarederror_before")
        for s in ("", "_ci95")
    }
    assert tested["test/loss"] == pytest.approx(tested["test/meansquarederror"], rel=1e-4)
    assert tested["test/loss"] != tested["test/loss_before"]
    loaded = MetaLearningModule.load_from_checkpoint(
        trainer.checkpoint_callback.best_model_path, network=mlp(), metrics=MeanSquaredError()
    )
    assert (loaded.inner_lr, loaded.eval_inner_steps) == (0.02, 3)
    again = Trainer(**QUIET).validate(loaded, data, verbose=False)[0]
    assert again == validated


def test_the_interval_is_over_episodes_and_the_metric_is_per_episode():
    module = MetaLearningModule(
        conv4(filters=4, image_size=16),
        inner_lr=0.1,
        metrics=MulticlassAccuracy(num_classes=5, average="micro"),
    )
    episodes = [
        EpisodeBatch(
            *[(torch.randn(3, 5 * n, 1, 16, 16), torch.arange(5).repeat_interleave(n).expand(3, -1)) for n in (1, 4)]
        )
        for _ in range(2)
    ]
    found = Trainer(**QUIET).test(module, DataLoader(episodes, batch_size=None), verbose=False)[0]
    values = []
    for (xs, ys), (xq, yq) in episodes:
        for task in range(3):
            params = {n: p.detach().requires_grad_() for n, p in module.network.named_parameters()}
            g = torch.autograd.grad(
                nn.functional.cross_entropy(torch.func.functional_call(module.network, params, (xs[task],)), ys[task]),
                list(params.values()),
            )
            adapted = {n: p - 0.1 * d for (n, p), d in zip(params.items(), g, strict=True)}
            logits = torch.func.functional_call(module.network, adapted, (xq[task],))
            values.append(float((logits.argmax(-1) == yq[task]).float().mean()))
    values = torch.tensor(values)
    assert found["test/accuracy"] == pytest.approx(float(values.mean()))
    assert found["test/accuracy_ci95"] == pytest.approx(1.96 * float(values.std()) / 6**0.5)


def test_metrics_are_logged_in_training(tmp_path):
    module = MetaLearningModule(mlp(), metrics=MetricCollection({"mse": MeanSquaredError()}))
    trainer = Trainer(max_steps=3, log_every_n_steps=1, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    trainer.fit(module, sinusoids())
    assert float(trainer.callback_metrics["train/mse"]) == pytest.approx(
        float(trainer.callback_metrics["train/loss"]), rel=1e-4
    )


def test_batch_norm_layers_with_running_statistics_keep_them_untouched():
    network = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    before = {n: b.clone() for n, b in network.named_buffers()}
    module = MetaLearningModule(network)
    trainer = Trainer(max_steps=3, enable_checkpointing=False, **QUIET)
    trainer.fit(module, sinusoids())
    assert all(torch.equal(b, before[n]) for n, b in network.named_buffers())
    assert not module.task_map.looped
    assert math.isfinite(trainer.test(module, sinusoids(), verbose=False)[0]["test/loss"])


def test_anil_adapts_the_head_alone_and_trains_everything():
    module = MetaLearningModule(mlp(), adapt=["4"], inner_lr=0.02)
    before = {n: p.detach().clone() for n, p in module.network.named_parameters()}
    assert module.inner_rates.names == ["4.weight", "4.bias"]
    fit(module, Sinusoid().sample(4, torch.Generator()), 3)
    assert all(not torch.equal(p, before[n]) for n, p in module.network.named_parameters())


def test_meta_sgd_learns_its_rates_and_they_survive_a_checkpoint(tmp_path):
    module = MetaLearningModule(mlp(), learn_inner_lr=True, inner_lr=0.01)
    trainer = Trainer(max_steps=5, default_root_dir=tmp_path, **QUIET)
    trainer.fit(module, sinusoids())
    assert all(not torch.equal(rate, torch.full_like(rate, 0.01)) for rate in module.learned_rates)
    loaded = MetaLearningModule.load_from_checkpoint(trainer.checkpoint_callback.best_model_path, network=mlp())
    assert all(torch.equal(a, b) for a, b in zip(loaded.learned_rates, module.learned_rates, strict=True))


def test_a_subclass_may_override_the_task_loss():
    class Huber(MetaLearningModule):
        def task_loss(self, params, batch):
            x, y = batch
            return nn.functional.huber_loss(self.predict(params, x), y)

    module = Huber(mlp())
    batch = Sinusoid().sample(3, torch.Generator())
    trainer = fit(module, batch, 1)
    assert math.isfinite(float(trainer.callback_metrics["train/loss"]))


class Own(MetaLearningModule):
    def __init__(self, hidden=8, rate=0.1, **arguments):
        super().__init__(mlp(1, (hidden,)), inner_lr=rate, **arguments)
        self.save_hyperparameters()


def test_a_subclass_with_its_own_arguments_loads(tmp_path):
    trainer = Trainer(max_steps=2, default_root_dir=tmp_path, **QUIET)
    trainer.fit(Own(hidden=12, rate=0.3, inner_steps=2), sinusoids())
    loaded = Own.load_from_checkpoint(trainer.checkpoint_callback.best_model_path)
    assert (loaded.inner_lr, loaded.hparams["hidden"], loaded.inner_steps) == (0.3, 12, 2)


def test_parameters_outside_the_network_are_named():
    module = MetaLearningModule(mlp())
    module.scale = nn.Parameter(torch.ones(1))
    with pytest.warns(GuardWarning, match=r"\['scale'\] lie outside `network`"):
        module.configure_optimizers()


def test_freezing_an_adapted_parameter_in_training_is_allowed():
    for arguments in ({"adapt": ["0", "4"]}, {"learn_inner_lr": True}):
        module = MetaLearningModule(mlp(), **arguments)
        module.network[0].weight.requires_grad_(False)
        fit(module, Sinusoid().sample(3, torch.Generator()), 2)
        assert "0.weight" not in module.rates()


def test_a_metric_with_several_values_is_refused():
    module = MetaLearningModule(
        conv4(filters=4, image_size=16), metrics=MulticlassAccuracy(num_classes=5, average=None)
    )
    episode = (torch.randn(2, 5, 1, 16, 16), torch.arange(5).expand(2, -1))
    with pytest.raises(ValueError, match="gave 5 values for one episode"):
        Trainer(**QUIET).test(module, DataLoader([EpisodeBatch(episode, episode)], batch_size=None), verbose=False)


def test_frozen_parameters_stay():
    network = mlp()
    network[0].weight.requires_grad_(False)
    before = network[0].weight.clone()
    module = MetaLearningModule(network)
    fit(module, Sinusoid().sample(3, torch.Generator()), 3)
    assert torch.equal(network[0].weight, before) and "0.weight" not in module.theta()


def test_a_network_that_cannot_be_vmapped_trains_in_a_loop():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(1, 1)

        def forward(self, x):
            return self.inner(x) if x.sum() > 0 else 2 * self.inner(x)

    module = MetaLearningModule(Branching())
    with pytest.warns(GuardWarning, match="cannot be vectorised"):
        fit(module, Sinusoid().sample(3, torch.Generator()), 2)
    assert module.task_map.looped


def test_the_users_optimizer_and_scheduler_are_used():
    module = MetaLearningModule(
        mlp(), optimizer=lambda p: SGD(p, lr=0.05), lr_scheduler=lambda o: ExponentialLR(o, 0.5)
    )
    configured = module.configure_optimizers()
    assert isinstance(configured["optimizer"], SGD) and isinstance(configured["lr_scheduler"], ExponentialLR)
    default = MetaLearningModule(mlp()).configure_optimizers()
    assert isinstance(default, torch.optim.Adam) and default.defaults["lr"] == 1e-3


def test_mixed_precision_and_accumulation_work():
    for arguments in (
        {"precision": "bf16-mixed"},
        {"accumulate_grad_batches": 2},
        {"gradient_clip_val": 0.1},
    ):
        module = MetaLearningModule(mlp())
        fit(module, Sinusoid().sample(3, torch.Generator()), 4, **arguments)
        assert all(torch.isfinite(p).all() for p in module.parameters())


@pytest.mark.parametrize("tracked", [False, True])
def test_batch_norm_is_vectorised_under_mixed_precision(tracked):
    network = nn.Sequential(nn.Linear(1, 6), nn.BatchNorm1d(6, track_running_stats=tracked), nn.ReLU(), nn.Linear(6, 1))
    module = MetaLearningModule(network)
    trainer = fit(module, Sinusoid().sample(3, torch.Generator()), 3, precision="bf16-mixed")
    assert not module.task_map.looped and math.isfinite(float(trainer.callback_metrics["train/loss"]))


def test_forward_predicts_without_adaptation():
    module = MetaLearningModule(mlp())
    x = torch.randn(4, 1)
    torch.testing.assert_close(module(x), module.network(x))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"network": "mlp"}, TypeError, "`network` to be a torch.nn.Module but got str"),
        ({"network": nn.ReLU()}, ValueError, "no parameter to train"),
        ({"inner_lr": -0.1}, ValueError, "`inner_lr` to be a finite number of at least 0 but got -0.1"),
        ({"inner_lr": math.nan}, ValueError, "`inner_lr` to be a finite number"),
        ({"inner_steps": 0}, ValueError, "`inner_steps` to be an integer of at least 1 but got 0"),
        ({"eval_inner_steps": -1}, ValueError, "`eval_inner_steps` to be an integer of at least 0 but got -1"),
        ({"order": "second"}, ValueError, "`order` to be one of"),
        ({"adapt": "nothing"}, ValueError, "matches no trainable parameter. There are: "),
        ({"adapt": []}, ValueError, "`adapt` is empty"),
        ({"task_chunk_size": 0}, ValueError, "`task_chunk_size` to be an integer of at least 1 but got 0"),
        (
            {"metrics": "accuracy"},
            TypeError,
            "`metrics` to be a torchmetrics Metric or MetricCollection but got str",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        MetaLearningModule(**{"network": mlp(), **arguments})


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (torch.zeros(3), ValueError, "Expected a batch to be an EpisodeBatch"),
        (
            ((torch.zeros(3, 2, 1),), (torch.zeros(2, 2, 1),)),
            ValueError,
            "3 tasks in `support` and 2 in `query`",
        ),
        (
            ((torch.zeros(0, 2, 1),), (torch.zeros(0, 2, 1),)),
            ValueError,
            "leading task dimension of at least 1",
        ),
        (
            ((torch.zeros(3, 2, 1), torch.zeros(2, 2)), (torch.zeros(3, 2, 1),)),
            ValueError,
            r"got shapes \[\(3, 2, 1\), \(2, 2\)\]",
        ),
        (
            (([1.0],), (torch.zeros(3, 2, 1),)),
            TypeError,
            r"leading task dimension but found float at support\[0\]\[0\]\. Stack the tasks",
        ),
        (
            ([{"x": torch.zeros(2, 1), "id": None}], (torch.zeros(3, 2, 1),)),
            TypeError,
            r"found NoneType at support\[0\]\['id'\]\. Leave it out",
        ),
        (
            ([object()], (torch.zeros(3, 2, 1),)),
            TypeError,
            r"found object at support\[0\]\. Stack the tasks' data",
        ),
    ],
)
def test_bad_batches_are_named(batch, error, message):
    with pytest.raises(error, match=message):
        MetaLearningModule(mlp()).meta_problem(batch)


def test_a_regression_target_of_another_shape_is_refused():
    x, y = torch.zeros(2, 5, 1), torch.zeros(2, 5)
    module = MetaLearningModule(mlp())
    with pytest.raises(ValueError, match=r"prediction has shape \(5, 1\) and the target \(5,\)"):
        fit(module, ((x, y), (x, y)), 1)


def test_patterns_select_by_name_glob_and_prefix():
    names = ["body.0.weight", "body.0.bias", "head.weight", "header.weight"]
    assert select(names, None) == names
    assert select(names, "head") == ["head.weight"]
    assert select(names, ["*.bias", "header.*"]) == ["body.0.bias", "header.weight"]


def test_episode_mean_of_one_episode_has_no_interval():
    metric = EpisodeMean()
    metric.update(torch.tensor(2.0))
    mean, half_width = metric.compute()
    assert float(mean) == 2.0 and math.isnan(float(half_width))
