"""Whether two states of the code train alike: ``python -m benchmarks.bitwise [--against CHECKOUT]``.

Two seeded runs, on one thread: the quick start's, and 300 steps that diverge, are rolled back and rescaled. Printed for
each are the last loss, a hash of all losses and weights, and what the guard did. With ``--against`` the same runs are
made by the package in another checkout, such as ``git worktree add /tmp/before c325147``, and the two are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, Trainer, seed_everything
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Keep it."""
        self.values.append(outputs["loss"].detach().clone())


def train(
    steps: int, lr: float, inner_lr: float, momentum: float, tasks: int, every: int, **options: Any
) -> dict[str, Any]:
    """Train, and describe the run."""
    seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    module = MetaLearningModule(mlp(), inner_lr=inner_lr, optimizer=lambda p: SGD(p, lr=lr, momentum=momentum))
    guard, losses = ConvergenceGuard(every_n_steps=every, action="rescale", **options), Losses()
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        callbacks=[guard, losses],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, TaskDataModule(Sinusoid(shots=10), meta_batch_size=tasks))
    tensors = [*losses.values, *module.state_dict().values()]
    digest = hashlib.sha256(b"".join(each.numpy().tobytes() for each in tensors)).hexdigest()
    rates = [(report.status, repr(report.alpha_applied), repr(report.beta_applied)) for report in guard.history]
    return {
        "last loss": float(losses.values[-1]),
        "losses and weights": digest[:16],
        "checks": len(guard.history),
        "states and applied rates": hashlib.sha256(repr(rates).encode()).hexdigest()[:16],
        "severities": hashlib.sha256(repr(guard.severities).encode()).hexdigest()[:16],
        "capped checks": sum(report.beta_applied < report.beta for report in guard.history),
    }


def main() -> None:
    """Run as a command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bitwise", description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    given = parser.parse_args()
    found = {
        "quick start": train(500, 1.0, 0.01, 0.0, 25, 10, margin=0.5),
        "rescale and rollback, 300 steps": train(300, 0.3, 0.05, 0.9, 4, 20, rollback=True),
    }
    if given.json:
        print(json.dumps(found))
        return
    other = None
    if given.against:
        environment = {**os.environ, "PYTHONPATH": str(given.against.resolve())}
        command = [sys.executable, str(Path(__file__).resolve()), "--json"]
        done = subprocess.run(command, env=environment, cwd=given.against, capture_output=True, text=True, check=True)
        other = json.loads(done.stdout.splitlines()[-1])
    for run, values in found.items():
        print(run)
        for name, value in values.items():
            same = "" if other is None else "  same" if other[run][name] == value else f"  there {other[run][name]}"
            print(f"  {name:26s}{value}{same}")
    if other is not None and other != found:
        raise SystemExit("The two differ.")


if __name__ == "__main__":
    main()
