"""The examples run, say what is true, and take as few added lines as they claim."""

import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_maml_guard import CurvatureOptions
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.regression import Sinusoid
from tests.helpers import dense_hessian, guard_warns

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


@pytest.mark.parametrize(
    ("name", "imports", "lines"), [("quickstart", 1, 2), ("existing_maml", 1, 9), ("plain_training", 1, 1)]
)
def test_the_lines_that_the_guard_adds_are_counted(name, imports, lines):
    added = [line for line in (EXAMPLES / f"{name}.py").read_text().splitlines() if re.search(r"# added\b", line)]
    brought = [line for line in added if line.startswith("from lightning_maml_guard import")]
    assert (len(brought), len(added) - len(brought)) == (imports, lines)
    # Without the added lines nothing names the guard but the imports, and what prints its numbers in main().
    rest = [line for line in (EXAMPLES / f"{name}.py").read_text().splitlines() if line not in added]
    assert not any("MetaProblem(" in line or "ConvergenceGuard(" in line or "[guard]" in line for line in rest)


def test_without_the_added_lines_the_hand_written_module_is_the_one_it_was(tmp_path):
    lines = (EXAMPLES / "existing_maml.py").read_text().splitlines()
    kept = "\n".join(line for line in lines if "# added" not in line)
    (tmp_path / "before.py").write_text(kept.replace("import Sinusoid", "import Sinusoid\nConvergenceGuard = None"))
    before = runpy.run_path(str(tmp_path / "before.py"))["HandWrittenMAML"]
    assert not hasattr(before, "meta_problem") and hasattr(before, "training_step")


@pytest.mark.parametrize("inner_steps", [1, 3])
def test_the_hand_written_modules_problem_is_what_it_trains(inner_steps):
    module = example("existing_maml")["HandWrittenMAML"](inner_lr=0.05, inner_steps=inner_steps).double()
    batch = Sinusoid(shots=5, queries=7).sample(3, episode_generator(0, "train", 0), "train")
    batch = tuple(tuple(value.double() for value in part) for part in batch)
    loss = module.training_step(batch, 0)
    loss.backward()
    found = meta_gradient(module.meta_problem(batch))
    assert float(found.losses.mean()) == pytest.approx(float(loss.detach()), rel=1e-12)
    for name, value in module.net.named_parameters():
        torch.testing.assert_close(found.gradients[name], value.grad, rtol=1e-9, atol=1e-12)


def test_the_hand_written_module_is_stopped_before_it_diverges_and_trains_at_what_was_measured(capsys):
    with guard_warns(r"beta = 0\.5 is too large\. Set .* steps tried on copies diverge"):
        stopped, trained = example("existing_maml")["main"]()
    assert stopped.stopped_step == 0 and stopped.history[0].alpha == 0.01
    assert (stopped.advice.cause, stopped.advice.alpha) == ("beta", None)
    assert 0.1 * stopped.history[0].beta_c < stopped.advice.beta < stopped.history[0].beta_c
    assert trained.stopped_step is None and trained.history[0].beta == stopped.advice.beta and trained.advice is None
    first, taken, advice, *checks, end = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"step 0: alpha = 0\.01 .*, beta = 0\.5 \(beta_c = 0\.1\d+\): unsafe", first)
    assert taken == "1 of 40 steps taken: the guard stopped the run"
    assert advice == f"advice: beta = 0.5 is too large. Set the optimizer's lr to {stopped.advice.beta}."
    assert [line.partition(":")[0] for line in checks] == ["step 0", "step 10", "step 20", "step 30"]
    assert all(line.endswith(": safe") for line in checks)
    assert end == "40 of 40 steps taken: the guard saw no reason to stop"


def test_the_plain_loop_lowers_its_meta_rate_and_trains_without_lightning():
    code = (
        "import runpy, sys\n"
        f"reports = runpy.run_path({str(EXAMPLES / 'plain_loop.py')!r})['main'](61)\n"
        "assert reports[0].status == 'unsafe' and reports[1].beta == 0.5 * reports[0].beta_c\n"
        "assert not {'pytorch_lightning', 'lightning'} & set(sys.modules), 'Lightning was imported'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=EXAMPLES.parent)
    assert done.returncode == 0, done.stderr[-2000:]
    first, *_, last = done.stdout.splitlines()
    assert re.fullmatch(r"step 0: beta = 0\.5, beta_c = 0\.1\d+: unsafe", first)
    assert float(re.fullmatch(r"query loss after 61 steps: (.*)", last)[1]) < 4


def test_plain_training_reports_the_sharpness_of_its_own_loss(capsys):
    found = example("plain_training")
    guard = found["main"]()
    printed = capsys.readouterr().out
    assert [report.step for report in guard.history] == [0, 20, 40, 60]
    for report in guard.history:  # momentum 0.9: 2 (1 + 0.9) / lambda_max
        assert report.beta_c == pytest.approx(3.8 / report.lambda_max, rel=2e-2)
        assert f"step {report.step}: sharpness {report.lambda_max:.3g}" in printed
    assert guard.history[0].status == "safe" and "40% of it: safe" in printed


def test_plain_trainings_limit_is_that_of_the_dense_hessian():
    from lightning_maml_guard import measure
    from lightning_maml_guard.stability.problems import training_step_problem

    module = example("plain_training")["Regression"]().double()
    x = torch.linspace(-2, 2, 32, dtype=torch.float64).unsqueeze(1)
    params = {name: value.detach() for name, value in module.named_parameters()}
    loss = lambda at: torch.nn.functional.mse_loss(  # noqa: E731
        torch.func.functional_call(module.net, {n.removeprefix("net."): v for n, v in at.items()}, (x,)), x**2
    )
    top = np.linalg.eigvalsh(dense_hessian(loss, params))[-1]
    report = measure(
        training_step_problem(module, [x, x**2], 0),
        optimizer=module.configure_optimizers(),
        curvature=CurvatureOptions(criterion="simplified", tol=1e-6),
    )
    assert report.beta_c == pytest.approx(3.8 / top, rel=1e-4)


def test_an_optuna_trial_that_cannot_converge_is_pruned_and_its_advice_is_tried_next():
    optuna = pytest.importorskip("optuna", reason="Optuna is not installed")
    objective, study = example("sweep_optuna")["objective"], optuna.create_study()
    study.enqueue_trial({"inner_lr": 0.01, "lr": 1.0})
    with guard_warns(r"beta = 1 is too large.*Training stops after this step"):
        study.optimize(lambda trial: objective(trial, 3), n_trials=2)
    pruned, tried = study.trials
    assert pruned.state is optuna.trial.TrialState.PRUNED and tried.state is optuna.trial.TrialState.COMPLETE
    assert tried.params["inner_lr"] == 0.01 and 0.01 < tried.params["lr"] < 0.14 and 1 < tried.value < 5


@pytest.mark.parametrize("lr", [1.0, 0.05])
def test_a_run_of_a_sweep_is_ended_by_the_guard_with_an_alert_or_evaluated(lr, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="the client of Weights & Biases is not installed")
    begin, alerts, logged = wandb.init, [], []

    def chosen():  # what wandb.agent does: a run whose config holds the rates
        run = begin(config={"inner_lr": 0.01, "lr": lr}, mode="offline", dir=tmp_path)
        monkeypatch.setattr(run, "alert", lambda **given: alerts.append(given))
        monkeypatch.setattr(run, "log", lambda values, **_: logged.append(values))
        return run

    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(wandb, "init", chosen)
    with guard_warns("beta = 1 is too large") if lr == 1.0 else nullcontext():
        guard = example("sweep_wandb")["train"](3)
    assert (guard.stopped_step is None) == any("val/loss" in each for each in logged) == (lr < 1)
    assert any("guard/beta_ratio" in each for each in logged)
    assert [each["title"] for each in alerts] == ([f"ConvergenceGuard: step 0: {guard.advice}"] if lr == 1.0 else [])
