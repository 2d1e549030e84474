"""A MAML module written by hand, plus the guard: only the lines marked "added" are new."""

from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import mse_loss

from lightning_maml_guard import ConvergenceGuard, MetaProblem, TaskDataModule  # added: the first two
from lightning_maml_guard.tasks.regression import Sinusoid


class HandWrittenMAML(LightningModule):
    """Second-order MAML: clone the parameters, adapt them to each task's support set, compute the query loss."""

    def __init__(self, inner_lr: float = 0.01, inner_steps: int = 2, lr: float = 0.5) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))
        self.inner_lr, self.inner_steps, self.lr = inner_lr, inner_steps, lr

    def adapt(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """Take the inner steps on one task's support set, and return the adapted parameters."""
        fast = {name: value.clone() for name, value in self.net.named_parameters()}
        for _ in range(self.inner_steps):
            loss = mse_loss(functional_call(self.net, fast, (x,)), y)
            gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
            moved = zip(fast.items(), gradients, strict=True)
            fast = {name: value - self.inner_lr * gradient for (name, value), gradient in moved}
        return fast

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Average the query loss over the tasks."""
        support, query = batch
        losses = []
        for x, y, query_x, query_y in zip(*support, *query, strict=True):
            losses.append(mse_loss(functional_call(self.net, self.adapt(x, y), (query_x,)), query_y))
        return torch.stack(losses).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Descend on the query loss."""
        return torch.optim.SGD(self.net.parameters(), lr=self.lr)

    def task_loss(self, params: dict[str, Tensor], data: Any) -> Tensor:  # added
        """Compute one task's loss at given parameters."""  # added
        return mse_loss(functional_call(self.net, params, (data[0],)), data[1])  # added

    def meta_problem(self, batch: Any) -> MetaProblem:  # added
        """Tell the guard what training_step computes."""  # added
        params: dict[str, Tensor] = dict(self.net.named_parameters())  # added
        return MetaProblem(params, self.task_loss, batch[0], batch[1], self.inner_lr, self.inner_steps)  # added


def train(lr: float, steps: int) -> tuple[Trainer, ConvergenceGuard]:
    """Train at an outer learning rate; the guard stops a run that cannot converge."""
    seed_everything(0, verbose=False)
    guard = ConvergenceGuard(every_n_steps=10, action="stop")  # added
    trainer = Trainer(
        max_steps=steps,
        callbacks=[guard],  # added
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(HandWrittenMAML(lr=lr), TaskDataModule(Sinusoid(shots=10), meta_batch_size=10).train_dataloader())
    return trainer, guard


def main(steps: int = 40) -> list[ConvergenceGuard]:
    """Train at an outer learning rate that is too large, then at the one the guard advises, and print its checks."""
    guards, lr = [], 0.5
    for _ in range(2):
        trainer, guard = train(lr, steps)
        guards.append(guard)
        for report in guard.history:
            print(f"step {report.step}: alpha = {report.alpha:.3g} (alpha_c = {report.alpha_c:.3g}), ", end="")
            print(f"beta = {report.beta:.3g} (beta_c = {report.beta_c:.3g}): {report.status}")
        print(f"{trainer.global_step} of {steps} steps taken", end=": ")
        print("the guard saw no reason to stop" if guard.stopped_step is None else "the guard stopped the run")
        if guard.advice is not None:
            print(f"advice: {guard.advice}")
            lr = guard.advice.beta or lr
    return guards


if __name__ == "__main__":
    main()
