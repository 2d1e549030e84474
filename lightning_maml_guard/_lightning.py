"""The only file that names Lightning."""

from pytorch_lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities.exceptions import MisconfigurationException
from pytorch_lightning.utilities.rank_zero import rank_zero_info as inform

__all__ = [
    "Callback",
    "LightningCLI",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "Trainer",
    "hyperparameters_given",
    "inform",
    "seed_everything",
]


def hyperparameters_given() -> bool:
    """Say whether LightningCLI is building this module and supplies its hyperparameters itself.

    Returns:
        True inside LightningCLI's instantiation.
    """
    from pytorch_lightning.core.mixins import hparams_mixin

    given = getattr(hparams_mixin, "_given_hyperparameters", None)
    return given is not None and given.get() is not None
