"""What a user would try instead: the old rule, Lightning's finder, and Optuna with the same number of steps."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.tuner import Tuner

from benchmarks.suggest.problems import BETAS, Problems
from lightning_maml_guard import CurvatureOptions, measure
from lightning_maml_guard.stability.problems import at_alpha
from lightning_maml_guard.tuner.rungs import RunGradients, Rungs

Pair = tuple[float, float]
_BATCHES, _MARGIN = 4, 0.5
# Of Optuna's trials: a short and a long one, as those of the ladder.
_TRIAL_STEPS, _HALVING_STEPS = 80, (20, 40, 80, 160)


def default(problems: Problems) -> Pair:
    """The rates as configured."""
    return problems.setting.alpha, BETAS[problems.setting.optimizer]


def old_rule(problems: Problems) -> Pair:
    """Half of the smallest critical rates before training; the default where there is none."""
    alpha, beta = default(problems)
    batches = [problems.problem(problems.batch(index)) for index in range(_BATCHES)]
    optimizer, curvature = problems.optimizer(), CurvatureOptions(tasks="worst")

    def smallest(of: list[Any], *names: str) -> float:
        known = [value for each in of for name in names if (value := getattr(each, name)) > 0]
        return min(known, default=math.nan)

    reports = [measure(each, optimizer=optimizer, curvature=curvature) for each in batches]
    limit = smallest(reports, "alpha_c")
    if math.isfinite(limit):
        alpha = _MARGIN * limit
        reports = [measure(at_alpha(b, alpha), optimizer=optimizer, curvature=curvature) for b in batches]
    limit = smallest(reports, "beta_c", "beta_c_noise")
    return alpha, _MARGIN * limit if math.isfinite(limit) else beta


class _WithRate(pl.LightningModule):
    """A module whose ``lr`` Lightning's finder may set."""

    def __init__(self, inside: Any, lr: float) -> None:
        super().__init__()
        self.inside, self.lr = inside, lr

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        """Return the module's loss."""
        self.inside.log = lambda *_, **__: None
        return self.inside.training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        """Make the module's optimizer at the present rate."""
        made = self.inside.configure_optimizers()
        for group in made.param_groups:
            group["lr"] = self.lr
        return made


def lightning_finder(problems: Problems) -> Pair:
    """Lightning's LearningRateFinder for the meta rate, at the default inner rate; the default where it fails."""
    alpha, beta = default(problems)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=200, accelerator="cpu", enable_model_summary=False, **quiet)
    module = _WithRate(problems.module, beta)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Tuner(trainer).lr_find(module, problems.data(), min_lr=1e-5, max_lr=10.0, num_training=100)
    suggested = None if found is None else found.suggestion()
    return alpha, beta if suggested is None else float(suggested)


def optuna_pair(problems: Problems, budget: int, halving: bool) -> Pair:
    """Optuna's TPE over the same ranges, with as many training steps as the ladder took; or successive halving."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    setting, usual = problems.setting, BETAS[problems.setting.optimizer]
    study = optuna.create_study(
        sampler=optuna.samplers.TPESampler(seed=problems.seed),
        pruner=optuna.pruners.SuccessiveHalvingPruner(20, 2) if halving else optuna.pruners.NopPruner(),
    )
    left, begun = budget, 0
    while left > 0:
        trial = study.ask()
        alpha = math.nan if setting.network is None else trial.suggest_float("alpha", 1e-3, 3.0, log=True)
        beta = trial.suggest_float("beta", 1e-2 * usual, 1e3 * usual, log=True)
        first, *_ = [problems.problem(problems.batch(2000 + begun))]
        like = next(iter(first.params.values())).detach()
        run = Rungs(first, [problems.optimizer()], like.new_tensor([alpha]), like.new_tensor([beta]), RunGradients())
        losses: list[float] = []
        stream, pruned = problems.stream(2000 + begun), False
        for step in range(1, (_HALVING_STEPS[-1] if halving else _TRIAL_STEPS) + 1):
            losses.append(float(run.step(next(stream))))
            left -= 1
            if not math.isfinite(losses[-1]):
                break
            if halving and step in _HALVING_STEPS:
                trial.report(sum(losses[-step // 4 :]) / len(losses[-step // 4 :]), step)
                if trial.should_prune():
                    pruned = True
                    break
        begun += len(losses)
        tail = losses[-max(len(losses) // 4, 1) :]
        end = sum(tail) / len(tail)
        if pruned:
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        elif math.isfinite(end):
            study.tell(trial, end)
        else:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
    done = [t for t in study.trials if t.state == optuna.trial.TrialState.COMPLETE]
    if not done:
        return default(problems)
    best = min(done, key=lambda trial: trial.value)
    return best.params.get("alpha", math.nan), best.params["beta"]


def has_optuna() -> bool:
    """Return True if Optuna is installed."""
    try:
        import optuna  # noqa: F401
    except ModuleNotFoundError:
        return False
    return True
