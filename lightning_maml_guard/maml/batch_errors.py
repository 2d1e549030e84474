"""Checks of a batch of episodes, and errors in the user's words instead of torch's.

What shows without reading a value (structure, task counts, shots) is checked at every step. Values are read only where
that costs nothing: labels before the first step, and everything once a step has failed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.utils.task_map import each_task, is_listed

# The class label that torch.nn.functional.cross_entropy ignores.
IGNORED = -100

LabelRange = tuple[int, int]

_LABELS = (
    "Labels lie between 0 and the number of the network's outputs less one: number the classes of an episode 0, 1, 2, "
    "..., or give the network more outputs."
)
# For nan that pads: a mean that leaves it out has the right value, and a gradient of nan.
NO_PADDING = "pass them as lists of tasks instead, each of its own size: [(x_1, y_1), (x_2, y_2), ...]."
# By what torch says, the first that fits: torch has no error types of its own for these.
_REMEDIES = (
    (r"target .* out of bounds", _LABELS),
    (r"index out of range in self", "An embedding has entries 0 to num_embeddings - 1: give it more, or lower x."),
    (r"indices", "An embedding takes integers, as in x.long()."),
    (r"device", "Put all of them on one device, as in x.to(parameter.device)."),
    (
        r"dtype|scalar type|type \(.*should be the same",
        "Give the inputs the parameters' dtype, as in x.float() (for bytes of an image x.float() / 255).",
    ),
    (
        r"at least 1D",
        "A task's x is a single number here: give x the shape (tasks, examples, features), as in x.reshape(-1, 1, 1).",
    ),
    (
        r"shape|size|dimension|channels",
        "Support and query go through one network: give both the shape its first layer takes.",
    ),
)


class BatchError(ValueError, RuntimeError):
    """The network or the loss could not take a batch; torch's own error is its cause."""


def check_batch(batch: Any) -> None:
    """Raise if a batch is not ``(support, query)``."""
    _check_pair(
        "a batch",
        batch,
        "an EpisodeBatch(support=(x, y), query=(x, y)) or such a nested tuple",
        "Let the loader (its collate_fn) return that; TaskDataModule does.",
    )


def check_task_data(data: Any) -> None:
    """Raise if one task's data is not ``(x, y)``."""
    _check_pair(
        "one task's `support` and `query`",
        data,
        "the pair (x, y)",
        "Bring the batch into that form, or override `task_loss` for other data.",
    )


def _check_pair(name: str, data: Any, what: str, remedy: str) -> None:
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        found = f"{type(data).__name__} of length {len(data)}" if _sized(data) else type(data).__name__
        raise ValueError(f"Expected {name} to be {what} but got {found}. {remedy}")


def _sized(data: Any) -> bool:
    return hasattr(data, "__len__") and not (isinstance(data, Tensor) and data.dim() == 0)


def label_range(batch: Any) -> LabelRange | None:
    """Return the smallest and largest class label of ``((x, y), (x, y))``; None if the targets are no class labels."""
    found = []
    for part in (task for each in batch for task in (each_task(each) if is_listed(each) else [each])):
        target = part[1] if isinstance(part, (tuple, list)) and len(part) == 2 else None
        if isinstance(target, Tensor) and _integer(target) and target.device.type != "meta":
            kept = target[target != IGNORED]
            found += [kept.min(), kept.max()] if kept.numel() else []
    if not found:
        return None
    values = torch.stack([value.long() for value in found]).tolist()
    return min(values), max(values)


def has_nan(problem: MetaProblem) -> bool:
    """Return True if a problem's data holds nan."""
    floats = [leaf for leaf in tree_leaves((problem.support, problem.query)) if leaf.is_floating_point()]
    return any(bool(torch.isnan(leaf).any()) for leaf in floats)


def check_labels(labels: LabelRange, classes: int) -> None:
    """Raise if a label lies outside of the network's outputs."""
    if labels[0] < 0 or labels[1] >= classes:
        raise BatchError(
            f"Expected class labels between 0 and {classes - 1}, for the network has {classes} outputs, but got labels "
            f"from {labels[0]} to {labels[1]}. {_LABELS}"
        )


def check_finite_start(problem: MetaProblem, losses: Tensor) -> None:
    """Raise if the first step's loss is not finite because its data or parameters are not.

    A loss that diverges on finite data passes: the rates caused it, and the guard deals with them.
    """
    if bool(torch.isfinite(losses).all()):
        return
    held = {f"`support`, tensor {i}": leaf for i, leaf in enumerate(tree_leaves(problem.support))}
    held |= {f"`query`, tensor {i}": leaf for i, leaf in enumerate(tree_leaves(problem.query))}
    held |= {f"the parameter {name!r}": value.detach() for name, value in problem.params.items()}
    bad = {name: int((~torch.isfinite(value)).sum()) for name, value in held.items()}
    bad = {name: number for name, number in bad.items() if number}
    if bad:
        places = "; ".join(f"{name} ({number} of {held[name].numel()} values)" for name, number in bad.items())
        raise BatchError(
            f"Expected the first batch and the parameters to be finite but got nan or inf in {places}, and the loss is "
            "not finite either. Drop or fill those values, or start from other parameters. Where nan fills tasks up to "
            f"the same size: {NO_PADDING}"
        )


class FirstBatch:
    """Reads values of the first batch only: on a GPU a label out of range would end the process's CUDA context."""

    def __init__(self) -> None:
        self.passed = False
        self.labels: LabelRange | None = None

    def read(self, batch: Any) -> None:
        """Read the labels, before the first step."""
        self.labels = None if self.passed else label_range(batch)

    def check_prediction(self, prediction: Any) -> None:
        """Raise if a label names no output of the network."""
        if self.labels is not None and isinstance(prediction, Tensor):
            check_labels(self.labels, prediction.shape[min(1, prediction.dim() - 1)])

    def check_losses(self, problem: MetaProblem, losses: Tensor) -> None:
        """Raise if the first step's data or parameters are not finite; from then on, check nothing."""
        if not self.passed:
            check_finite_start(problem, losses)
            self.passed = True


@contextmanager
def explained(problem: MetaProblem) -> Iterator[None]:
    """Turn torch's errors about dtypes, devices, shapes or labels into a BatchError that describes the batch."""
    try:
        yield
    except (RuntimeError, IndexError) as error:
        said = " ".join(str(error).split())
        remedies = [remedy for pattern, remedy in _REMEDIES if re.search(pattern, said, re.IGNORECASE)]
        # Subclasses of these are not about the batch: out of memory, or the user's own.
        if type(error) not in {RuntimeError, IndexError} or not remedies or "memory" in said:
            raise
        raise BatchError(
            f"The network or the loss could not take this batch. torch said: {said.rstrip('.')}. With the task "
            f"dimension first, `support` holds {_held(problem.support)}; `query` holds {_held(problem.query)}; the "
            f"parameters are {_kinds(list(problem.params.values()))}. {remedies[0]}"
        ) from error


def _held(data: Any) -> str:
    return ", ".join(_described(leaf) for leaf in tree_leaves(data))


def _described(leaf: Tensor) -> str:
    text = f"{leaf.dtype} {tuple(leaf.shape)} on {leaf.device}"
    if _integer(leaf) and leaf.device.type == "cpu" and leaf.numel():
        text += f" with values from {int(leaf.min())} to {int(leaf.max())}"
    return text


def _kinds(tensors: list[Tensor]) -> str:
    return " and ".join(sorted({f"{tensor.dtype} on {tensor.device}" for tensor in tensors}))


def _integer(tensor: Tensor) -> bool:
    return not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
