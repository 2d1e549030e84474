"""The loss of a task that users give, and the one that stands in for it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_maml_guard.utils.checks import check_function


def default_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Take cross-entropy for integer targets and the mean squared error otherwise.

    Args:
        prediction: Logits ``(n, classes)``, or values of the target's shape.
        target: Class indices ``(n,)``, or values.

    Returns:
        The scalar loss.

    Raises:
        ValueError: If prediction and target do not fit in shape (broadcasting would hide it).
        TypeError: If the prediction is not a tensor.
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
    """Refuse a loss that can't be called on a prediction and a target.

    Args:
        loss: The loss.

    Raises:
        TypeError: If it is not callable, or a class.
    """
    if isinstance(loss, type):
        raise TypeError(
            f"Expected argument `loss` to be callable, (prediction, target) -> scalar, but got the class "
            f"{loss.__name__}. Pass an instance: {loss.__name__}()."
        )
    check_function("loss", loss, "(prediction, target) -> scalar", "torch.nn.functional.mse_loss")
