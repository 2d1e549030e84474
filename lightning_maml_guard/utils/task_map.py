"""Run a function of one task over a batch of tasks: vmapped, or in a loop where vmap does not work."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from lightning_maml_guard.utils.checks import check_count, first_line
from lightning_maml_guard.utils.warnings import GuardWarning

T = TypeVar("T")
# "all": vmapped at once; "loop": one after another; a number: this many vmapped at once.
Strategy = str | int


def task_count(data: Any, name: str) -> int:
    """Count the tasks in a pytree of tensors with a leading task dimension.

    Raises a ValueError that calls it ``name`` if there is no tensor or no task, or if the tensors disagree, and a
    TypeError if a leaf is not a tensor.
    """
    leaves = tree_leaves(data)
    strangers = sorted({type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)})
    if strangers:
        raise TypeError(
            f"Expected `{name}` to hold tensors with a leading task dimension but found {', '.join(strangers)}. "
            "Stack the tasks' data, as in torch.stack([task.x for task in tasks])."
        )
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
    if len(sizes) != 1 or 0 in sizes:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(
            f"Expected `{name}` to hold tensors that share a leading task dimension of at least 1 but got "
            f"shapes {shapes}. A single task needs that dimension as well: unsqueeze(0)."
        )
    return sizes.pop()


class TaskMap:
    """Applies a function of one task to every task of a batch, ``chunk_size`` at once (None: all).

    Tries :func:`torch.func.vmap` first. If that fails and a plain loop works, it warns once and loops from then on; if
    the loop fails too, the loop's error (the user's own) is raised. ``looped`` starts with the loop; ``strict`` raises
    vmap's error.
    """

    def __init__(self, chunk_size: int | None = None, looped: bool = False, strict: bool = False) -> None:
        if chunk_size is not None:
            check_count("task_chunk_size", chunk_size)
        self.chunk_size = chunk_size
        self.looped = looped
        self.strict = strict

    def __call__(self, function: Callable[..., T], *args: Any, in_dims: tuple[int | None, ...]) -> T:
        """Map a function over the tasks.

        ``in_dims`` is 0 for arguments with a leading task dimension, None for shared ones; every argument is a pytree.
        The outputs have a leading task dimension.
        """
        return self._try(
            lambda: torch.func.vmap(function, in_dims, randomness="different", chunk_size=self.chunk_size)(*args),
            lambda: self._loop(function, args, in_dims),
        )

    def apply(self, one: Callable[..., T], together: Callable[..., T], *args: Any) -> T:
        """Map a function given in two forms: of one task, and of several tasks in a leading dimension."""
        return self._try(lambda: self._in_chunks(together, args), lambda: self._loop(one, args, (0,) * len(args)))

    def _try(self, vectorised: Callable[[], T], looped: Callable[[], T]) -> T:
        if self.looped:
            return looped()
        try:
            return vectorised()
        except Exception as error:
            if self.strict:
                raise
            result = looped()
            self.looped = True
            warnings.warn(
                f"The tasks of a batch cannot be vectorised, so they run one after another (slower, same "
                f"result). torch.func.vmap said: {first_line(error)}",
                GuardWarning,
                stacklevel=3,
            )
            return result

    def _in_chunks(self, together: Callable[..., T], args: tuple[Any, ...]) -> T:
        count = tree_leaves(args)[0].shape[0]
        size = self.chunk_size or count
        if size >= count:
            return together(*args)
        outputs = [
            together(*tree_map(lambda leaf, at=start: leaf[at : at + size], args)) for start in range(0, count, size)
        ]
        return _joined(outputs, torch.cat)

    @staticmethod
    def _loop(function: Callable[..., T], args: tuple[Any, ...], in_dims: tuple[int | None, ...]) -> T:
        mapped = [arg for arg, dim in zip(args, in_dims, strict=True) if dim is not None]
        outputs = []
        for index in range(tree_leaves(mapped)[0].shape[0]):
            outputs.append(
                function(
                    *(
                        arg if dim is None else tree_map(lambda leaf, i=index: leaf[i], arg)
                        for arg, dim in zip(args, in_dims, strict=True)
                    )
                )
            )
        return _joined(outputs, torch.stack)


def _joined(outputs: list[T], join: Callable[[Any], Tensor]) -> T:
    leaves, spec = zip(*(tree_flatten(output) for output in outputs), strict=True)
    return tree_unflatten([join(group) for group in zip(*leaves, strict=True)], spec[0])


def task_map(strategy: Strategy, strict: bool = False) -> TaskMap:
    """Make the map of a strategy."""
    return TaskMap(None if isinstance(strategy, str) else strategy, looped=strategy == "loop", strict=strict)


def as_float32(tree: T) -> T:
    """Convert the half-precision tensors of a pytree to float32; other tensors are returned unchanged."""
    half = (torch.float16, torch.bfloat16)
    return tree_map(lambda leaf: leaf.float() if leaf.dtype in half else leaf, tree)
