"""Whatever fails inside a check, the run goes on as if the guard were not there."""

import ast
import os
import random
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_maml_guard import (
    ConvergenceGuard,
    CurvatureOptions,
    EpisodeBatch,
    GuardWarning,
    LookaheadOptions,
    MetaLearningModule,
)
from lightning_maml_guard.guard.actions import Rescale
from lightning_maml_guard.guard.check import Check
from lightning_maml_guard.optim.lr_cap import LRCap
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.utils.lightning_compat import Callback, Trainer
from tests.helpers import QUIET, fit, grouped, guard_warns, is_free_of_hooks, linear_module, one_line, quadratic_batch

PACKAGE = Path(__file__).parents[2] / "lightning_maml_guard"
# What runs after a failure, to undo or to report it, has nothing behind it that could undo it in turn; `check` is the
# shell that catches.
AFTERWARDS = {"_failure", "of_error", "announce", "warn", "check"}


class InjectedError(Exception):
    pass


def undoing(path: Path) -> set[int]:
    """Lines of a file that put something back, or at which nothing can be raised."""
    tree, lines = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        body = []
        if isinstance(node, ast.Try):
            # `try:` is a NOP of its own, outside of what the exception table says of the `with` around it (CPython
            # 3.11): nothing but a tracer raises there, and what it raises leaves that `with` open.
            lines.add(node.lineno)
            body = [*node.finalbody, *(inner for handler in node.handlers for inner in handler.body)]
        elif isinstance(node, ast.FunctionDef) and (
            node.name.startswith(("_restore", "undo")) or node.name in AFTERWARDS
        ):
            body = node.body
        for inner in body:
            lines |= set(range(inner.lineno, inner.end_lineno + 1))
    return lines


class Injector:
    """Raises once at every line of the package that checks run through (or every n-th): one line a check."""

    def __init__(self, error: type[BaseException], every: int = 1) -> None:
        self.error, self.every, self.hit, self.live, self.at = error, every, set(), False, ""
        self._undoing = {str(path): undoing(path) for path in PACKAGE.rglob("*.py")}

    def __enter__(self):
        self.live, self._tracer = True, sys.gettrace()
        sys.settrace(self._calls)
        return self

    def __exit__(self, *_):
        sys.settrace(self._tracer)  # coverage's

    def _calls(self, frame, event, argument):
        return self._lines if self.live and frame.f_code.co_filename in self._undoing else None

    def _lines(self, frame, event, argument):
        place = frame.f_code.co_filename, frame.f_lineno
        if not self.live or event != "line" or place in self.hit or place[1] % self.every:
            return self._lines
        if place[1] not in self._undoing[place[0]]:
            self.hit.add(place)
            self.live, self.at = False, f"{Path(place[0]).name}:{place[1]}"
            raise self.error(f"injected at {self.at}")
        return self._lines


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.2), nn.Tanh(), nn.Linear(3, 1))

    def forward(self, x):
        return self.layers(x)


def module(beta):
    torch.manual_seed(0)
    return MetaLearningModule(Net(), inner_lr=0.05, optimizer=lambda p: SGD(p, lr=beta, momentum=0.5))


def batch():
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(2, 6, n, generator=generator) for n in (2, 1))
    return EpisodeBatch((x[:, :3], y[:, :3]), (x[:, 3:], y[:, 3:]))


def modes():
    """What of torch's global state a check changes while it lasts."""
    backends = torch.backends.cuda
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.cudnn.enabled,
        (backends.flash_sdp_enabled(), backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled()),
        torch._C._len_torch_function_stack(),
        torch.compiler._stance.stance if hasattr(torch.compiler, "_stance") else None,
    )


def state(module, optimizer):
    generators = random.getstate(), np.random.get_state()[1].tobytes(), torch.get_rng_state().numpy().tobytes()
    return {
        "random": repr(generators),
        "modes": modes(),
        "training": [part.training for part in module.modules()],
        "gradients": [id(parameter.grad) for parameter in module.parameters()],
        "buffers": repr([(id(value), value.tolist()) for value in module.buffers()]),  # nan equals nan
        "logging": "log" in module.__dict__ or "log_dict" in module.__dict__,
        "hooks": (len(optimizer._optimizer_step_pre_hooks), len(optimizer._optimizer_step_post_hooks)),
        "rates": [group["lr"] for group in optimizer.param_groups],
        "parameters": repr([value.tolist() for value in module.parameters()]),
        "optimizer": repr(sorted(optimizer.state_dict()["state"].items())),
    }


@pytest.fixture
def watched(monkeypatch):
    """Runs every check under an injector and compares what was before it with what is after."""

    def watch(injector, acts: bool):
        check = Check.check
        told = {"checks": 0, "interrupts": 0, "exhausted": False}

        def checked(self, *arguments, **options):
            optimizer = self.trainer.optimizers[0]
            before = state(self.module, optimizer)
            told["checks"] += 1
            try:
                with injector:
                    check(self, *arguments, **options)
            except KeyboardInterrupt:
                told["interrupts"] += 1
            if injector.live and not acts:  # nothing was left to raise at
                told["exhausted"] = self.trainer.should_stop = True
            after = state(self.module, optimizer)
            if acts:  # a guard that acts caps the optimizer, and may roll parameters and optimizer state back
                assert after["hooks"] in {(0, 0), (1, 1)}
                for name in ("hooks", "parameters", "optimizer", "buffers"):
                    before.pop(name), after.pop(name)
            assert after == before, f"after {injector.at}"

        monkeypatch.setattr(Check, "check", checked)
        return told

    return watch


QUICK, ALL = 50, pytest.param(1, marks=pytest.mark.slow)


@pytest.mark.parametrize("every", [QUICK, ALL])
@pytest.mark.parametrize("error", [InjectedError, KeyboardInterrupt])
@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_injected_at_every_line_of_a_check(error, every, watched):
    injector = Injector(error, every)
    told = watched(injector, acts=False)
    options = {"every_n_steps": 1, "action": "log", "max_iter": 3, "steps": 1, "batches": 2}
    trained = module(0.05)
    trainer = fit(trained, batch(), 3000, [ConvergenceGuard(**grouped(**options))])
    assert told["exhausted"]
    plain = module(0.05)
    fit(plain, batch(), trainer.global_step)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), trained.parameters(), strict=True))
    files = {Path(place[0]).name for place in injector.hit}
    print(f"{len(injector.hit)} lines in {len(files)} files, {told['checks']} checks")
    known = {"check.py", "isolation.py", "measurement.py", "lanczos.py", "lookahead.py", "objective.py", "beta_c.py"}
    assert known <= files or (every > 1 and len(files) > 10)
    assert len(injector.hit) > 500 / every
    assert told["interrupts"] == (len(injector.hit) if error is KeyboardInterrupt else 0)


@pytest.mark.parametrize("every", [QUICK, ALL])
@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_injected_at_every_line_of_a_check_that_acts(every, watched):
    injector = Injector(InjectedError, every)
    told = watched(injector, acts=True)
    steps = 1200 // every
    for beta in (3.0, 30.0):
        guard = ConvergenceGuard(
            every_n_steps=1,
            action="rescale",
            rollback=True,
            max_rollbacks=10**6,
            curvature=CurvatureOptions(max_iter=3),
            lookahead=LookaheadOptions(steps=2, batches=2),
        )
        trainer = fit(module(beta), batch(), steps, [guard])
        assert trainer.global_step == steps or guard.stopped_step
        assert not trainer.optimizers[0]._optimizer_step_pre_hooks
        assert trainer.optimizers[0].param_groups[0]["lr"] == beta
    assert len(injector.hit) > 600 / every
    files = {Path(place[0]).name for place in injector.hit}
    print(f"{len(injector.hit)} lines in {len(files)} files, {told['checks']} checks")
    assert {"rescale.py", "actions.py", "rollback.py"} <= files or (every > 1 and len(files) > 10)


@pytest.mark.slow  # each check makes a whole search
@pytest.mark.parametrize("every", [4 * QUICK, 1])
@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_injected_at_every_line_of_a_check_that_advises(every, watched, monkeypatch):
    """Parameters and optimizer state that it takes back to a sane state are put back, wherever it fails."""
    injector = Injector(InjectedError, every)
    told, restored = watched(injector, acts=False), []
    watching, put_back = Check.check, Snapshot.restore

    def restore(self, *arguments):
        restored.append(self.step)
        put_back(self, *arguments)

    def watched_anew(self, *arguments, **options):
        self.run.machine.watches, self.run.state.advice, self.run.state.searches = {}, None, 0
        if self.run.ring.latest is None:  # to take it may have failed at step 0, and it is what there is to go back to
            self.rollback.keep(0)
        watching(self, *arguments, **options)

    monkeypatch.setattr(Check, "check", watched_anew)
    monkeypatch.setattr(Snapshot, "restore", restore)
    options = {"every_n_steps": 1, "action": "log", "max_iter": 3, "steps": 1, "batches": 2}
    guard, trained = ConvergenceGuard(**grouped(**options)), module(30.0)
    trainer = fit(trained, batch(), 3000, [guard])
    assert told["exhausted"] and 0 in restored and guard.advice is not None
    plain = module(30.0)
    fit(plain, batch(), trainer.global_step)
    for one, other in zip(plain.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    files = {Path(place[0]).name for place in injector.hit}
    print(f"{len(injector.hit)} lines in {len(files)} files, {told['checks']} checks")
    assert {"advising.py", "rate_search.py", "snapshot.py"} <= files or (every > 1 and len(files) > 3)


QUADRATIC = quadratic_batch([1.0, 2.0, 4.0])


def raises(error):
    def problem(module, batch):
        if module.global_step == 2:
            raise error
        return module.meta_problem(batch)

    return problem


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (
            torch.OutOfMemoryError("no room on the device"),
            r"\(test_failure.py, line \d+, in problem\) To do: A check needs .* lower max_iter or the module's "
            "task_chunk_size.*basis='bfloat16' or 'cpu'.*batches=1",
        ),
        (ZeroDivisionError("no tasks today"), r"To do: Fix test_failure.py, line \d+, in problem\. Training continues"),
    ],
)
def test_a_failed_check_says_where_why_and_what_to_do(error, remedy):
    plain, module = linear_module(3, 0.1), linear_module(3, 0.1)
    fit(plain, QUADRATIC, 6)
    guard = ConvergenceGuard(every_n_steps=1, problem=raises(error))
    said = rf"the check at step 2 failed. Cause: {type(error).__name__}: {error} "
    with guard_warns(said + remedy) as caught:
        fit(module, QUADRATIC, 6, [guard])
    assert len([each for each in caught if each.category is GuardWarning]) == 1
    assert [report.step for report in guard.history] == [0, 1, 3, 4, 5]
    assert torch.equal(plain.network.weight, module.network.weight)


def no_curvature(monkeypatch, steps=None):
    """The measurement fails, at some steps or at all: a layer without a second derivative, a library that is gone."""
    from lightning_maml_guard.guard import judgement

    measure = judgement.measure

    def fails(problem, *, step, **arguments):
        if steps is None or step in steps:
            raise NotImplementedError("no derivative here")
        return measure(problem, step=step, **arguments)

    monkeypatch.setattr(judgement, "measure", fails)


@pytest.mark.parametrize("action", ["log", "warn"])
def test_a_run_whose_curvature_cannot_be_measured_is_judged_by_its_next_steps(action, monkeypatch):
    no_curvature(monkeypatch)
    healthy = ConvergenceGuard(every_n_steps=2, action=action)
    with pytest.warns(GuardWarning) as caught:
        fit(linear_module(3, 0.1), QUADRATIC, 6, [healthy])
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert len(said) == 1 and "failed to measure the curvature" in said[0]
    assert "NotImplementedError: no derivative here To do: Fix test_failure.py, line" in said[0]
    assert [(report.step, report.status) for report in healthy.history] == [(at, "unresolved") for at in (0, 2, 4)]
    assert all(report.severity < 0 for report in healthy.history)
    diverging = ConvergenceGuard(every_n_steps=2, action=action)
    with pytest.warns(GuardWarning) as caught:
        fit(linear_module(3, 3.0), QUADRATIC, 6, [diverging])
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert diverging.history[0].status == "unsafe" and len(said) == (2 if action == "warn" else 1)
    if action == "warn":
        assert (
            "step 0: beta = 3 is too large. Set the optimizer's lr to 0." in said[1] and "take the loss from" in said[1]
        )
        assert "could not be measured" not in said[1]  # told already, and no reason to lower a rate


def test_without_curvature_a_guard_still_stops_and_lowers(monkeypatch):
    no_curvature(monkeypatch)
    stopped = ConvergenceGuard(every_n_steps=2, action="stop")
    with guard_warns("failed to measure the curvature"):
        fit(linear_module(3, 3.0), QUADRATIC, 6, [stopped])
    assert stopped.stopped_step == 0
    lowered = ConvergenceGuard(every_n_steps=2, action="rescale")
    module = linear_module(3, 0.6)
    start = float(torch.linalg.vector_norm(module.network.weight.detach()))
    with guard_warns("failed to measure the curvature"):
        fit(module, QUADRATIC, 40, [lowered])
    # Half of it, for no limit is known.
    assert lowered.history[0].beta_applied == 0.3
    assert float(torch.linalg.vector_norm(module.network.weight.detach())) < 0.1 * start


class Ragged(LightningModule):
    """A hand-written MAML on lists of tasks; what it hands to the guard cannot be stacked."""

    def __init__(self, lr):
        super().__init__()
        self.weight, self.lr = nn.Parameter(torch.ones(1)), lr

    def training_step(self, batch, batch_idx):
        return torch.stack([((x * self.weight) ** 2).mean() for x in batch]).mean()

    def meta_problem(self, batch):
        return torch.stack(batch)

    def configure_optimizers(self):
        return SGD(self.parameters(), lr=self.lr)


RAGGED = [torch.ones(2), torch.ones(3)]


@pytest.mark.parametrize("action", ["warn", "stop", "rescale"])
def test_a_problem_that_cannot_be_stated_names_the_users_line_and_the_guard_is_loud_when_the_loss_leaves(
    action, applied
):
    guard = ConvergenceGuard(every_n_steps=4, action=action, rollback=False)
    module = Ragged(1e6)
    reached = applied(module.weight)
    with pytest.warns(GuardWarning) as caught:
        trainer = fit(module, RAGGED, 20, [guard])
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert "the check at step 0 failed" in said[0] and "To do: Fix test_failure.py, line" in said[0]
    assert "in meta_problem." in said[0] and "The last loss is" in said[1]
    assert said[1].startswith("ConvergenceGuard: step 2: training diverges for a reason that is not known.")
    assert not guard.history and guard.severities[0][1] > 1
    assert (guard.stopped_step is not None) == (action != "warn") == (trainer.global_step < 20)
    assert action != "stop" or guard.stopped_step == 2
    assert len(said) == 2 + (action == "rescale")
    if action == "rescale":
        assert said[2].endswith(
            ": Training stops: the parameters are not finite, and there are no earlier ones that would stay finite."
        )
        assert guard._run.caps.caps.beta <= 5e5 and reached[:3] == [1e6, 1e6, 5e5] and max(reached[2:]) == 5e5


def test_a_problem_that_cannot_be_stated_is_no_bar_to_a_rollback(applied):
    """What is said to be lowered is: all optimizers, as it is not known which of them are meant."""
    module = Ragged(1e6)
    guard, reached = ConvergenceGuard(every_n_steps=4, action="rescale"), applied(module.weight)
    with guard_warns(r"the loss was 4e\+12 at step 2.*rolled back to step 0.*the outer rate is halved: beta = 5e\+05"):
        trainer = fit(module, RAGGED, 40, [guard])
    assert guard.stopped_step is not None and is_free_of_hooks(trainer)  # after ten of them
    assert reached[:2] == [1e6, 1e6] and set(reached[2:-1]) == {1e6 / 2**k for k in range(1, 11)} and reached[-1] == 0
    assert float(module.weight.detach()) == 1.0 or bool(torch.isfinite(module.weight).all())


def test_a_loss_that_becomes_nan_is_told_where_no_check_could_be_made():
    class Struck(Ragged):
        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 9:
                with torch.no_grad():
                    self.weight.fill_(float("nan"))

    with guard_warns("step 10: training diverges for a reason that is not known.*The loss is nan at these"):
        fit(Struck(0.1), RAGGED, 20, [ConvergenceGuard(every_n_steps=4)])


def test_products_that_are_not_finite_are_named_and_training_goes_on():
    class Kink(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 0 * (self.weight * 0).norm()  # finite gradient, NaN product

    def module():
        torch.manual_seed(0)
        return MetaLearningModule(Kink(3, 1).double(), inner_lr=0.0, order="first", optimizer=lambda p: SGD(p, lr=0.1))

    plain, guarded, guard = module(), module(), ConvergenceGuard(every_n_steps=2)
    fit(plain, QUADRATIC, 6)
    with pytest.warns(GuardWarning) as caught:
        fit(guarded, QUADRATIC, 6, [guard])
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert all("could not be measured" in each or "finite differences" in each for each in said) and said
    assert torch.equal(plain.network.weight, guarded.network.weight)


class BrokenLogger(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if "guard/beta_c" in metrics:
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_does_not_end_training_nor_the_guard(tmp_path):
    guard = ConvergenceGuard(every_n_steps=2, action="rescale")
    with pytest.warns(GuardWarning) as caught:
        trainer = fit(linear_module(3, 3.0), QUADRATIC, 6, [guard], logger=BrokenLogger(tmp_path))
    assert trainer.global_step == 6 and len(guard.history) == 3 and guard.history[-1].beta_applied < 3.0
    (said,) = [each for each in map(one_line, (w.message for w in caught)) if "the server is gone" in each]
    assert said.startswith("ConvergenceGuard: could not send values to the loggers; training goes on. Cause: Conn")
    assert guard.history[0].step == 0 and not any("unguarded" in one_line(each.message) for each in caught)


class BrokenAtLooks(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if "guard/severity" in metrics and "guard/safe" not in metrics:
            raise ConnectionError("the server is gone")
        super().log_metrics(metrics, step)


def test_a_logger_that_fails_at_a_look_without_measurement_fails_no_check(tmp_path):
    guard = ConvergenceGuard()
    with pytest.warns(GuardWarning) as caught:
        fit(linear_module(3, 0.1), QUADRATIC, 6, [guard], logger=BrokenAtLooks(tmp_path))
    assert [step for step, _ in guard.severities] != [each.step for each in guard.history]
    (said,) = [each for each in map(one_line, (w.message for w in caught)) if "the server is gone" in each]
    assert said.startswith("ConvergenceGuard: could not send values to the loggers; training goes on. Cause: Conn")


@pytest.mark.filterwarnings("error::lightning_maml_guard.GuardWarning")
def test_warnings_that_the_user_made_errors_are_errors():
    with pytest.raises(GuardWarning, match=r"step 0: beta = 30 is too large\. Set the optimizer's lr to\s+0\.\d"):
        fit(linear_module(3, 30.0), QUADRATIC, 3, [ConvergenceGuard()])


class Terminate(Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("inside", [False, True])
def test_sigterm_inside_a_check_ends_training_as_outside(inside):
    def problem(module, batch):
        Terminate().on_train_batch_start(None, module, batch, module.global_step)
        return module.meta_problem(batch)

    module = linear_module(3, 0.1)
    guard = ConvergenceGuard(**grouped(every_n_steps=1, **{"problem": problem} if inside else {}))
    with pytest.raises(SIGTERMException):
        fit(module, QUADRATIC, 6, [guard] if inside else [guard, Terminate()])
    assert module.global_step == 3 and len(guard.history) == 3


class Hookless(SGD):
    """An optimizer that takes no step hooks, as duck-typed ones do not."""

    def register_step_pre_hook(self, hook):
        raise AttributeError("no hooks here")


@pytest.mark.parametrize("rollback", [False, True])
def test_an_optimizer_that_cannot_be_capped_is_told_and_nothing_is_claimed(tmp_path, rollback):
    def guarded(**arguments):
        guard, module = ConvergenceGuard(every_n_steps=2, action="rescale", rollback=rollback), linear_module(3, 0.3)
        module._optimizer = lambda parameters: Hookless(parameters, lr=3.0)
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
        with guard_warns("AttributeError: no hooks here") as caught:
            trainer = fit(module, QUADRATIC, 5, [guard, keep], enable_checkpointing=True, **arguments)
        said = [one_line(each.message) for each in caught if each.category is GuardWarning]
        assert not any("halved" in text or "Applied" in text for text in said)
        if rollback:
            assert "could not lower the outer rate; training goes on" in said[1] and len(said) == 4
            assert all(text.endswith("The outer rate could not be lowered.") for text in said[2:])
        else:
            assert len(said) == 1
        assert trainer.global_step == 5 and guard.history == [] and guard.state_dict()["capped"] == []

    guarded()
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=True)
    (state,) = [value for key, value in checkpoint["callbacks"].items() if "ConvergenceGuard" in key]
    state["capped"], state["caps"]["beta"] = [0], 0.1  # as if it could have been capped once
    guard = ConvergenceGuard(action="rescale")
    guard.load_state_dict(state)
    trainer = type(
        "Trainer", (), {"optimizers": [Hookless([torch.nn.Parameter(torch.ones(1))], lr=1.0)], "strategy": None}
    )()
    with guard_warns("could not apply the caps that the checkpoint holds; training goes on"):
        guard.on_train_start(trainer, linear_module(3, 0.3))


class HalfHooked(SGD):
    """An optimizer that takes pre hooks only."""

    def register_step_post_hook(self, hook):
        raise AttributeError("no hooks here")


def test_a_cap_that_could_not_be_put_back_is_not_applied():
    optimizer = HalfHooked([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(AttributeError, match="no hooks here"):
        LRCap([optimizer], 0.1)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_check_that_fails_before_it_acts_warns_of_the_rates_at_the_next(monkeypatch):
    decide, calls = Rescale.decide, []

    def fails_once(self, *arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise MemoryError("no room for another lookahead")
        return decide(self, *arguments, **options)

    monkeypatch.setattr(Rescale, "decide", fails_once)
    with pytest.warns(GuardWarning) as caught:
        fit(
            linear_module(3, 0.6),
            QUADRATIC,
            6,
            [ConvergenceGuard(every_n_steps=2, action="rescale", lookahead=LookaheadOptions(divergence_ratio=1.5))],
        )
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert (
        "MemoryError: no room" in said[0] and "step 2: beta = 0.6 is too large. Set the optimizer's lr to 0." in said[1]
    )


def test_a_snapshot_of_other_tensors_is_not_put_back():
    module = nn.Linear(2, 1)
    optimizer = SGD([module.weight], lr=0.1)
    snapshot = Snapshot(module, [optimizer], 7)
    optimizer.add_param_group({"params": [module.bias]})
    before = module.weight.detach().clone()
    with torch.no_grad():
        snapshot._tensors[0].zero_()
    with pytest.raises(ValueError, match="other tensors than at step 7"):
        snapshot.restore(module, [optimizer])
    assert torch.equal(module.weight, before)


class Unfrozen(LightningModule):
    """A body that joins the optimizer after some steps, as BackboneFinetuning does it; then the rate is raised."""

    def __init__(self, lr):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.lr = nn.Linear(4, 8).requires_grad_(False), nn.Linear(8, 1), lr

    def on_train_batch_start(self, batch, batch_idx):
        groups = self.optimizers().param_groups
        if batch_idx == 20:
            self.body.requires_grad_(True)
            self.optimizers().add_param_group({"params": list(self.body.parameters())})
        for group in groups:
            group["lr"] = self.lr if batch_idx >= 50 else 0.1

    def training_step(self, batch, batch_idx):
        return (self.head(torch.tanh(self.body(batch[0]))) - batch[1]).pow(2).mean()

    def configure_optimizers(self):
        return SGD(self.head.parameters(), lr=0.1)


@pytest.mark.parametrize(("lr", "told"), [(0.1, 0), (20.0, 1)])
def test_a_run_is_guarded_on_when_parameters_join_its_optimizer(lr, told):
    torch.manual_seed(0)
    batches = [(x, x.sum(1, keepdim=True)) for x in torch.randn(100, 16, 4)]
    guard = ConvergenceGuard(every_n_steps=10)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Trainer(max_epochs=1, callbacks=[guard], **QUIET).fit(Unfrozen(lr), DataLoader(batches, batch_size=None))
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert not [each for each in said if "failed" in each] and len(guard.history) >= 5
    assert (guard.advice is not None) == bool(told) == any("is too large" in each for each in said)


def test_an_exception_in_training_leaves_no_cap_in_the_optimizer():
    class Boom(Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 6:
                held.append(trainer)
                raise ZeroDivisionError("user code")

    held, guard = [], ConvergenceGuard(every_n_steps=5, action="rescale")
    module = linear_module(4, 1.5, inner_lr=0.05, order="simplified")
    with pytest.warns(GuardWarning, match="beta = 1.5 is too large"), pytest.raises(ZeroDivisionError):
        fit(module, quadratic_batch([0.3, 1.0, 2.0, 4.0], target=1.0), 20, [guard, Boom()])
    (optimizer,) = held[0].optimizers
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    before = module.network.weight.detach().clone()
    module.network.weight.grad = torch.ones_like(before)
    optimizer.step()
    torch.testing.assert_close(before - module.network.weight.detach(), torch.full_like(before, 1.5))
    assert guard.state_dict()["caps"]["beta"] < 1.0  # what a checkpoint made on the way out holds
