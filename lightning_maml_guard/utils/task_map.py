"""Run a function of one task over a batch of tasks: vmapped, or in a loop where vmap does not work."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils import _pytree
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_map, tree_unflatten

from lightning_maml_guard.utils.checks import check_count, first_line
from lightning_maml_guard.utils.warnings import GuardWarning

T = TypeVar("T")
# "all": vmapped at once; "loop": one after another; a number: this many vmapped at once.
Strategy = str | int


class TaskList(list[Any]):
    """Tasks one by one, each a pytree of tensors of its own sizes, in place of a leading task dimension."""


register_pytree_node(TaskList, lambda tasks: (list(tasks), None), lambda tasks, context: TaskList(tasks))


def tree_leaves(data: Any, is_leaf: Callable[[Any], bool] | None = None) -> list[Any]:
    """Do what torch's function of this name does; of the usual tuples of tensors without its cost."""
    if isinstance(data, Tensor):
        return [data]
    if type(data) is tuple and is_leaf in (None, is_listed):
        return [leaf for each in data for leaf in tree_leaves(each, is_leaf)]
    return _pytree.tree_leaves(data, is_leaf=is_leaf)


def is_listed(data: Any) -> bool:
    """Return True if a set of tasks lists them one by one."""
    return isinstance(data, TaskList)


def as_tasks(support: Any, query: Any) -> tuple[Any, Any]:
    """Mark the sets that list their tasks one by one.

    A list of tuples (lists, dicts) of tensors is one. A tuple of such is one where it cannot be read as tensors with a
    leading task dimension, which is how nested tuples are read otherwise.
    """
    support, query = (
        TaskList(each) if type(each) is list and _is_list_of_tasks(each) else each for each in (support, query)
    )
    sizes = _task_counts(support) | _task_counts(query)
    if len(sizes) == 1 and 0 not in sizes:
        return support, query
    return tuple(  # type: ignore[return-value]
        TaskList(each) if type(each) is tuple and _is_list_of_tasks(each) else each for each in (support, query)
    )


def _is_list_of_tasks(data: Sequence[Any]) -> bool:
    leaves = [tree_leaves(each) for each in data]
    tensors = all(isinstance(leaf, Tensor) for task in leaves for leaf in task)
    return bool(data) and tensors and all(leaves) and not any(isinstance(each, Tensor) for each in data)


def _task_counts(data: Any) -> set[int]:
    """The task counts by the tensors' leading dimensions and the lists' lengths; 0 for what has none."""
    leaves = tree_leaves(data, is_leaf=is_listed)
    return {len(leaf) if is_listed(leaf) or (isinstance(leaf, Tensor) and leaf.dim()) else 0 for leaf in leaves}


def each_task(data: Any) -> list[Any]:
    """Take a set of tasks apart."""
    count = len(tree_leaves(data, is_leaf=is_listed)[0])
    return [_task(data, index) for index in range(count)]


def _task(data: Any, index: int) -> Any:
    return tree_map(lambda leaf: leaf[index], data, is_leaf=is_listed)


def first_tasks(data: Any, count: int) -> Any:
    """Take the first tasks of a set."""
    return tree_map(lambda leaf: TaskList(leaf[:count]) if is_listed(leaf) else leaf[:count], data, is_leaf=is_listed)


def joined_tasks(sets: Sequence[Any]) -> Any:
    """Put several sets of tasks into one; None where they are not alike."""
    found = [tree_flatten(data, is_leaf=is_listed) for data in sets]
    first, spec = found[0]
    for leaves, structure in found:
        alike = structure == spec and all(
            is_listed(one) == is_listed(other) and (is_listed(one) or one.shape[1:] == other.shape[1:])
            for one, other in zip(leaves, first, strict=True)
        )
        if not alike:
            return None
    columns = zip(*(leaves for leaves, _ in found), strict=True)
    joined = [
        TaskList(task for tasks in column for task in tasks) if is_listed(column[0]) else torch.cat(list(column))
        for column in columns
    ]
    return tree_unflatten(joined, spec)


def chosen_tasks(data: Any, chosen: Sequence[int]) -> Any:
    """Take tasks of a set by their indices, some maybe more than once."""
    return tree_map(
        lambda leaf: TaskList(leaf[index] for index in chosen) if is_listed(leaf) else leaf[list(chosen)],
        data,
        is_leaf=is_listed,
    )


def task_count(data: Any, name: str) -> int:
    """Count the tasks in a pytree of tensors with a leading task dimension, or in a list of tasks.

    Raises a ValueError that calls it ``name`` if there is no tensor or no task, or if the tensors disagree, and a
    TypeError if a leaf is not a tensor.
    """
    leaves = tree_leaves(data)
    non_tensors = [leaf for leaf in leaves if not isinstance(leaf, Tensor)]
    if non_tensors:
        kinds = ", ".join(sorted({type(leaf).__name__ for leaf in non_tensors}))
        to_do = "Leave it out, or make it a tensor."
        if not all(isinstance(leaf, (type(None), str)) for leaf in non_tensors):
            to_do = (
                "Stack the tasks' data, as in torch.stack([task.x for task in tasks]), or list the tasks, as in "
                "[(task.x, task.y) for task in tasks]."
            )
        raise TypeError(
            f"Expected `{name}` to hold tensors with a leading task dimension but found {kinds} at "
            f"{name}{_path_of_non_tensor(data)}. {to_do}"
        )
    if is_listed(data):
        return len(data)
    sizes = {leaf.shape[0] if leaf.dim() else 0 for leaf in leaves}
    if len(sizes) != 1 or 0 in sizes:
        shapes = [tuple(leaf.shape) for leaf in leaves]
        raise ValueError(
            f"Expected `{name}` to hold tensors that share a leading task dimension of at least 1 but got "
            f"shapes {shapes}. A single task needs that dimension as well: unsqueeze(0). Tasks of different sizes go "
            "into a list of tasks: [(x_1, y_1), (x_2, y_2), ...]."
        )
    return sizes.pop()


def _path_of_non_tensor(data: Any) -> str:
    """The index expression of the first leaf that is not a tensor, such as ``[0]['x']``."""

    def has_no_keys(node: Any) -> bool:
        kind = _pytree.SUPPORTED_NODES.get(type(node))
        return kind is not None and kind.flatten_with_keys_fn is None

    found, _ = _pytree.tree_flatten_with_path(data, is_leaf=has_no_keys)
    holds = (path for path, leaf in found if not all(isinstance(each, Tensor) for each in tree_leaves(leaf)))
    return _pytree.keystr(next(holds))


class TaskMap:
    """Applies a function of one task to every task of a batch, ``chunk_size`` at once (None: all).

    Tries :func:`torch.func.vmap` first. If that fails and a plain loop works, it warns once and loops from then on; if
    the loop fails too, the loop's error (the user's own) is raised. ``looped`` starts with the loop; ``strict`` raises
    vmap's error. Listed tasks, a :class:`TaskList`, are always looped over; outputs whose sizes differ come in one too.
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
        if _any_listed(args):
            return self._loop(function, args, in_dims)

        def named(*given: Any) -> T:  # torch 2.6 asks for the name, and that of a partial prints its tensors
            return function(*given)

        return self._try(
            lambda: torch.func.vmap(named, in_dims, randomness="different", chunk_size=self.chunk_size)(*args),
            lambda: self._loop(function, args, in_dims),
        )

    def apply(self, one: Callable[..., T], together: Callable[..., T], *args: Any, added: bool = False) -> T:
        """Map a function given in two forms: of one task, and of several tasks in a leading dimension.

        ``added``: it returns a pair, whose first part is the sum over its tasks and is added up as the tasks are run.
        """
        zeros = (0,) * len(args)
        if _any_listed(args):
            return self._loop(one, args, zeros, added)
        return self._try(lambda: self._in_chunks(together, args, added), lambda: self._loop(one, args, zeros, added))

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

    def _in_chunks(self, together: Callable[..., T], args: tuple[Any, ...], added: bool) -> T:
        count = tree_leaves(args)[0].shape[0]
        size = self.chunk_size or count
        if size >= count:
            return together(*args)
        outputs = (
            together(*tree_map(lambda leaf, at=start: leaf[at : at + size], args)) for start in range(0, count, size)
        )
        return _joined(outputs, torch.cat, added)

    @staticmethod
    def _loop(
        function: Callable[..., T], args: tuple[Any, ...], in_dims: tuple[int | None, ...], added: bool = False
    ) -> T:
        mapped = [arg for arg, dim in zip(args, in_dims, strict=True) if dim is not None]
        outputs = (
            function(*(arg if dim is None else _task(arg, index) for arg, dim in zip(args, in_dims, strict=True)))
            for index in range(len(tree_leaves(mapped, is_leaf=is_listed)[0]))
        )
        return _joined(outputs, _stacked, added)


def _any_listed(args: tuple[Any, ...]) -> bool:
    # An argument is a set of tasks, or a tuple of a support and a query set.
    return any(is_listed(part) for arg in args for part in (arg if type(arg) is tuple else (arg,)))


def _stacked(group: Sequence[Tensor]) -> Any:
    same = len({value.shape for value in group}) == 1
    return torch.stack(tuple(group)) if same else TaskList(group)


def _joined(outputs: Iterable[Any], join: Callable[[Any], Any], added: bool = False) -> Any:
    """Join what a function returned for each task; ``added``: its first part is summed instead."""
    total: list[Tensor] = []
    rest, spec = [], None
    for count, output in enumerate(outputs):
        if added:
            leaves, spec = tree_flatten(output[0])
            total = _sum(total, leaves, count) if count else leaves
        rest.append(output[1] if added else output)
    leaves_of_each, specs = zip(*(tree_flatten(each) for each in rest), strict=True)
    found = tree_unflatten([join(group) for group in zip(*leaves_of_each, strict=True)], specs[0])
    return (tree_unflatten(total, cast(Any, spec)), found) if added else found


def _sum(total: list[Tensor], more: list[Tensor], count: int) -> list[Tensor]:
    # In place from the third output on: entries of the first may share a tensor. Never if a graph may hold them.
    if count == 1 or any(each.requires_grad for each in (*total, *more)):
        return [one + other for one, other in zip(total, more, strict=True)]
    torch._foreach_add_(total, more)
    return total


def task_map(strategy: Strategy, strict: bool = False) -> TaskMap:
    """Make the map of a strategy."""
    return TaskMap(None if isinstance(strategy, str) else strategy, looped=strategy == "loop", strict=strict)


def as_float32(tree: T) -> T:
    """Convert the half-precision tensors of a pytree to float32; other tensors are returned unchanged."""
    half = (torch.float16, torch.bfloat16)
    return tree_map(lambda leaf: leaf.float() if leaf.dtype in half else leaf, tree)
