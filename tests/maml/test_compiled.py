"""compile=True: the same training, one warning where it cannot be compiled, nothing compiled anew; the default Adam."""

import copy
import functools
import inspect
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torchmetrics import MeanSquaredError

from lightning_maml_guard import ConvergenceGuard, EpisodeBatch, GuardWarning, MetaLearningModule
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import mlp
from tests.helpers import fit, guard_warns


def batch(tasks=5):
    return EpisodeBatch(*((torch.randn(tasks, 4, 1), torch.randn(tasks, 4, 1)) for _ in range(2)))


def trained(steps=4, given=None, callbacks=(), **arguments):
    torch.manual_seed(2)
    network = mlp(1, (8,), 1, activation="tanh")
    module = MetaLearningModule(network, optimizer=lambda p: SGD(p, lr=0.1), **{"inner_lr": 0.05, **arguments})
    fit(module, given or batch(), steps, callbacks)
    return module


def same(module, other, atol=1e-6):
    for found, expected in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=atol)


@pytest.fixture
def compiler(monkeypatch):
    """torch.compile that does nothing, and lists what it was given and what its results were called with."""
    calls = {"compiled": [], "run": []}

    def compile(function, options):
        calls["compiled"].append(function)

        def run(*args):
            calls["run"].append(args)
            return function(*args)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    return calls


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_fit_is_the_eager_one_with_the_guard_beside_it(backend, monkeypatch):
    """Traced as for the default backend; what that one adds is a C++ compiler's 20 seconds."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    guard = ConvergenceGuard(action="log", every_n_steps=2)
    found = trained(5, compile=True, callbacks=[guard])
    same(found, trained(5), atol=1e-5)
    assert not found.compiled.given_up and len(found.compiled._functions) == 1
    assert len(guard.history) >= 2


@pytest.mark.parametrize("vectorize", ["all", 2, 3, "loop"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"inner_steps": 2},
        {"order": "first", "inner_steps": 3},
        {"order": "simplified", "adapt": "2"},
        {"learn_inner_lr": True, "inner_steps": 2, "order": "exact"},
        {"learn_inner_lr": True, "order": "first"},
    ],
)
def test_every_way_and_order_trains_as_without(compiler, vectorize, arguments):
    """Five tasks, so that the last of the chunks is smaller; training metrics need the predictions in order."""
    arguments |= {"vectorize": vectorize, "metrics": MeanSquaredError()}
    found = trained(2, compile=True, **arguments)
    assert len(compiler["compiled"]) == 1 and len(compiler["run"]) == {"all": 1, 2: 3, 3: 2, "loop": 5}[vectorize]
    expected = trained(2, **arguments)
    same(found, expected)
    values = [float(module.trainer.callback_metrics["train/meansquarederror"]) for module in (found, expected)]
    assert values[0] == pytest.approx(values[1], rel=1e-5) and not found.compiled.given_up


def test_a_cap_on_the_inner_rate_compiles_nothing_anew(compiler):
    module = trained(2, compile=True)
    problem_of = module.meta_problem
    for cap in (0.04, 0.03):
        module.inner_lr_cap = cap
        module.compiled(problem_of(batch()), tasks=module.task_map, learn_rates=False, auxiliary=module._auxiliary())
    assert len(compiler["compiled"]) == 1
    rates = [args[1] for args in compiler["run"]]
    assert all(isinstance(rate, torch.Tensor) for rate in rates)  # a number would be compiled in
    assert [round(float(rate), 6) for rate in rates] == [0.05, 0.04, 0.03]


SCALE = 1.0


class Scaled(nn.Linear):
    def forward(self, x):
        return SCALE * super().forward(x)


@pytest.mark.skipif(
    not hasattr(torch.compiler, "skip_guard_on_globals_unsafe"), reason="this torch cannot filter its conditions"
)
def test_what_users_change_is_compiled_anew_and_what_nobody_changes_is_not_looked_at(monkeypatch):
    """A module-level number and a module's own attribute: torch.compile's conditions on these stay."""
    real, kept = torch.compile, []

    def compile(function, options):
        told = options["guard_filter_fn"]

        def note(conditions):
            conditions = list(conditions)
            answers = told(conditions)
            kept.append((sum(answers), len(answers)))
            return answers

        return real(function, backend="aot_eager", options={"guard_filter_fn": note})

    monkeypatch.setattr(torch, "compile", compile)
    torch.manual_seed(1)
    module = MetaLearningModule(Scaled(1, 1), inner_lr=0.05, compile=True)
    given = batch()

    def agree():
        problem, others = module.meta_problem(given), {"learn_rates": False, "auxiliary": module._auxiliary()}
        found = module.compiled(problem, tasks=module.task_map, **others)
        torch.testing.assert_close(found.losses, meta_gradient(problem).losses)
        return found.losses

    before = agree()
    assert len(kept) == 1 and 0 < kept[0][0] < kept[0][1] / 2
    agree()
    assert len(kept) == 1
    monkeypatch.setattr(f"{__name__}.SCALE", 3.0)
    assert not torch.allclose(agree(), before) and len(kept) == 2
    module.loss = lambda prediction, y: ((prediction - y) ** 4).mean()
    agree()
    assert len(kept) == 3 and not module.compiled.given_up


@pytest.mark.parametrize("at", ["compiling", "running"])
def test_what_cannot_be_compiled_runs_without_and_says_so_once(monkeypatch, at):
    def refuse(*args, **options):
        raise RuntimeError("no C++ compiler found\nand more")

    monkeypatch.setattr(torch, "compile", refuse if at == "compiling" else lambda *_, **__: refuse)
    with guard_warns("cannot be compiled here.*torch.compile said: RuntimeError: no C.. compiler found$") as caught:
        found = trained(4, compile=True)
    assert sum(each.category is GuardWarning for each in caught) == 1 and found.compiled.given_up
    same(found, trained(4), atol=0)


def test_an_error_of_the_users_own_is_raised_as_it_is_and_gives_nothing_up(compiler):
    class Fails(MetaLearningModule):
        def task_loss(self, params, batch):
            if self._first_batch.passed:
                raise ZeroDivisionError("mine")
            return super().task_loss(params, batch)

    module = Fails(mlp(), compile=True)
    with warnings.catch_warnings(), pytest.raises(ZeroDivisionError, match="mine"):
        warnings.simplefilter("error", GuardWarning)
        fit(module, batch(), 2)
    assert not module.compiled.given_up


def test_copies_and_pickles_hold_no_function_of_the_originals(compiler):
    module = trained(2, compile=True)
    module.trainer = None
    module._optimizer = None
    other = copy.deepcopy(module)
    assert other.compiled._functions == {} and len(module.compiled._functions) == 1
    other.inner_lr /= 3  # the same adaptation with three times the loss
    other.loss = lambda prediction, y: 3 * nn.functional.mse_loss(prediction, y)
    given = batch()
    losses = [
        each.compiled(
            each.meta_problem(given), tasks=each.task_map, learn_rates=False, auxiliary=each._auxiliary()
        ).losses
        for each in (module, other)
    ]
    torch.testing.assert_close(losses[1], 3 * losses[0])
    module.compiled.given_up = True
    assert pickle.loads(pickle.dumps(module)).compiled.given_up


def test_vectorize_and_compile_are_among_the_hyperparameters(tmp_path):
    module = MetaLearningModule(mlp(), compile=True, vectorize=2)
    assert module.hparams["compile"] is True and module.hparams["vectorize"] == 2
    assert MetaLearningModule(mlp()).compiled is None
    with pytest.raises((TypeError, ValueError), match="`compile`"):
        MetaLearningModule(mlp(), compile="yes")
    for name in ("vectorize", "compile"):
        assert f"    {name}: " in inspect.getdoc(MetaLearningModule)


def test_the_default_adam_is_fused_and_trains_as_the_plain_one():
    torch.manual_seed(4)
    modules = [MetaLearningModule(mlp(), optimizer=None)]
    modules.append(copy.deepcopy(modules[0]))
    modules[1]._optimizer = lambda params: torch.optim.Adam(params, lr=1e-3)
    given = batch()
    for module in modules:
        fit(module, given, 5)
    assert modules[0].trainer.optimizers[0].defaults["fused"] and not modules[1].trainer.optimizers[0].defaults["fused"]
    same(*modules, atol=1e-7)


def test_in_mixed_precision_the_default_adam_lets_gradients_be_clipped():
    module = MetaLearningModule(mlp())
    trainer = fit(module, batch(), 2, precision="bf16-mixed", gradient_clip_val=1.0)
    assert trainer.global_step == 2 and not trainer.optimizers[0].defaults["fused"]
    trainer = fit(MetaLearningModule(mlp()), batch(), 2, gradient_clip_val=1.0)
    assert trainer.global_step == 2 and trainer.optimizers[0].defaults["fused"]
