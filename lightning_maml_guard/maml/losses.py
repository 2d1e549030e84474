"""The default loss of a task, and the check of one that users pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_maml_guard.utils.checks import check_function


def default_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy for integer targets and the mean squared error otherwise.

    Raises if the shapes of prediction and target do not fit: broadcasting would hide it.
    """
    if not isinstance(prediction, Tensor):
        raise TypeError(
            f"Expected the network to return a tensor but got {type(prediction).__name__}. Return the prediction "
            "alone, or pass a `loss` of your own."
        )
    if not target.is_floating_point():
        expected = prediction.shape[:1] + prediction.shape[2:] if prediction.dim() > 1 else torch.Size()
        if target.shape != expected:
            raise ValueError(
                f"Expected class labels (integer targets) of shape {tuple(expected)} for a prediction of shape "
                f"{tuple(prediction.shape)} but got {tuple(target.shape)} for one task. Squeeze labels to that shape; "
                "for a regression make the targets floats, y.float()."
            )
        return F.cross_entropy(prediction, target)
    if prediction.shape != target.shape:
        raise ValueError(
            f"The network's prediction has shape {tuple(prediction.shape)} and the target {tuple(target.shape)} for "
            "one task; they must agree. Reshape the targets (class labels are integers: y.long()), or pass a `loss` "
            "of your own."
        )
    return F.mse_loss(prediction, target)


def check_loss(loss: Any) -> None:
    """Raise if ``loss`` cannot be called on a prediction and a target."""
    if isinstance(loss, type):
        raise TypeError(
            f"Expected argument `loss` to be callable, (prediction, target) -> scalar, but got the class "
            f"{loss.__name__}. Pass an instance: {loss.__name__}()."
        )
    check_function("loss", loss, "(prediction, target) -> scalar", "torch.nn.functional.mse_loss")
