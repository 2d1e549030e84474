"""An Optuna study over both learning rates: a trial whose rates cannot converge is pruned, and its advice tried next.

Needs ``pip install optuna``.
"""

import optuna
from pytorch_lightning import Trainer, seed_everything
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid


def objective(trial: optuna.Trial, steps: int = 500) -> float:
    """Train with the trial's learning rates, and return the loss on validation episodes."""
    rates = {"inner_lr": trial.suggest_float("inner_lr", 1e-3, 0.3, log=True)}
    rates["lr"] = trial.suggest_float("lr", 1e-3, 3.0, log=True)
    seed_everything(0, verbose=False)
    module = MetaLearningModule(
        mlp(), inner_lr=rates["inner_lr"], optimizer=lambda parameters: SGD(parameters, lr=rates["lr"])
    )
    episodes = TaskDataModule(Sinusoid(shots=10), meta_batch_size=25, val_episodes=100)
    guard = ConvergenceGuard(action="stop")
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = Trainer(max_steps=steps, callbacks=[guard], logger=False, limit_val_batches=0, **quiet)  # type: ignore[arg-type]
    trainer.fit(module, episodes)
    if guard.stopped_step is not None:
        if guard.advice is not None:
            better = {"inner_lr": guard.advice.alpha, "lr": guard.advice.beta}
            trial.study.enqueue_trial({name: better[name] or rate for name, rate in rates.items()}, skip_if_exists=True)
        raise optuna.TrialPruned(f"stopped at step {guard.stopped_step}: {guard.stopping_reason}")
    return float(Trainer(logger=False, **quiet).validate(module, episodes, verbose=False)[0]["val/loss"])  # type: ignore[arg-type]


def main(trials: int = 20, steps: int = 500) -> optuna.Study:
    """Search, and print the best rates and how many trials were pruned."""
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.TPESampler(seed=0))
    study.optimize(lambda trial: objective(trial, steps), n_trials=trials)
    pruned = study.get_trials(states=[optuna.trial.TrialState.PRUNED])
    print(
        f"{len(pruned)} of {trials} trials pruned; best validation loss {study.best_value:.3g} at {study.best_params}"
    )
    return study


if __name__ == "__main__":
    main()
