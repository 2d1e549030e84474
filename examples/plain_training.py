"""Without meta-learning: the guard measures the largest stable learning rate ``beta_c`` of any LightningModule."""

import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.nn.functional import mse_loss
from torch.utils.data import DataLoader, TensorDataset

from lightning_maml_guard import ConvergenceGuard  # added: import


class Regression(LightningModule):
    """A small network that learns a parabola."""

    def __init__(self, lr: float = 0.1) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        return mse_loss(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Descend with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def main(lr: float = 0.1) -> ConvergenceGuard:
    """Train for some epochs, and print the learning rate as a share of its limit."""
    seed_everything(0, verbose=False)
    x = torch.linspace(-2, 2, 256).unsqueeze(1)
    trainer = Trainer(
        max_epochs=10,
        callbacks=[guard := ConvergenceGuard(every_n_steps=20)],  # added
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(Regression(lr), DataLoader(TensorDataset(x, x**2), batch_size=32, shuffle=True))
    for report in guard.history:
        print(f"step {report.step}: sharpness {report.lambda_max:.3g}, beta_c = {report.beta_c:.3g}", end=", ")
        print(f"beta = {report.beta:.3g} is {report.beta_ratio:.0%} of it: {report.status}")
    return guard


if __name__ == "__main__":
    main()
