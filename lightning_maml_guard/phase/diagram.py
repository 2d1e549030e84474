"""Phase diagrams: the training error over a grid of inner and outer learning rates, beside the critical rates."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from functools import partial as partial_of

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.checkpoint import ChunkStore
from lightning_maml_guard.phase.divergence import divergence_steps
from lightning_maml_guard.phase.gradients import runs_at_once
from lightning_maml_guard.phase.optimizers import MetaOptimizer, meta_optimizer
from lightning_maml_guard.phase.result import PhaseDiagram
from lightning_maml_guard.phase.train import GridSettings, as_family, train_runs
from lightning_maml_guard.utils.checks import check_count, check_flag, check_folder, check_number, check_rates, shown
from lightning_maml_guard.utils.distributed import ProcessGroup, Ranks
from lightning_maml_guard.utils.io import fingerprint

__all__ = ["PhaseDiagram", "phase_diagram"]


def phase_diagram(
    problem_family: MetaProblem | Callable[[int], MetaProblem],
    alphas: Iterable[float],
    betas: Iterable[float],
    steps: int,
    *,
    optimizer: str | MetaOptimizer = "sgd",
    judged_on: MetaProblem | None = None,
    measure_every: int | None = None,
    exact: bool = True,
    max_iter: int = 20,
    tol: float = 1e-2,
    divergence: float = 5.0,
    chance: float = math.inf,
    chunk_size: int | None = None,
    memory: float | None = None,
    partial: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> PhaseDiagram:
    """Train every pair of an inner and an outer learning rate, all from the same weights on the same tasks.

    All pairs train as one program: ``vmap`` runs over the pairs, then over the tasks. The meta-gradients are those of
    :class:`MetaLearningModule`, so a pair ends where a Trainer with its rates would. Critical rates are measured before
    training, every ``measure_every`` steps and after it. Under ``torch.distributed`` (a launch by torchrun whose
    process group is initialised) the ranks share the chunks, and each returns the whole diagram.

    Source: Takagi, Nagano, Yoshida, Okada, "On the conditions of MAML convergence": training error over a grid of
    ``(alpha, beta)`` with ``alpha_c = 1/lambda_max`` and ``beta_c = min_i 2/(lambda_i - alpha*lambda_i^2)``.

    Args:
        problem_family: The problem of every step, or ``step -> MetaProblem`` where each step draws new tasks. All runs
            start from the params of step 0, and run on their device; the params of later steps are not read. Its
            ``inner_lr`` is replaced by ``alphas`` (for the parameters it names, where it is a dict).
        alphas: Inner learning rates, the columns of the diagram; at least 0, strictly ascending.
        betas: Outer learning rates, its rows; at least 0, strictly ascending.
        steps: Training steps.
        optimizer: Meta-optimizer: ``"sgd"``, ``"adam"`` or one of ``phase.optimizers``, such as ``SGD(momentum=0.9)``.
        judged_on: The problem on which the errors before and after training are taken (default: that of step 0).
        measure_every: Steps between two measurements (None: only before and after training; 0: no measurement).
        exact: Whether to measure ``exact_beta_c``, which doubles the cost of a measurement.
        max_iter: Most matrix-vector products of a measurement.
        tol: Relative residual at which a measurement stops.
        divergence: A run has diverged when its loss exceeds this many times its start.
        chance: Error that is reached without learning, such as ``log(n)`` for n classes. A run counts as trained
            only if its final error is at most 0.9 of that too.
        chunk_size: Runs trained at once (None: as many as fit ``memory`` and keep every rank busy).
        memory: Bytes a chunk may take (None: 1e9 on a CPU, half of a GPU's memory).
        partial: Folder in which unfinished work is saved, at least every minute; the same call goes on from there.
        progress: Show a progress bar (on rank 0).

    Returns:
        The diagram.

    Raises:
        GridError: If the task loss cannot be vmapped over runs, or if the inner rates differ between steps.
        SharedError: If another rank failed.
        TypeError: If the family does not return a MetaProblem.
        ValueError: If another argument is not allowed, or if ``partial`` holds chunks of another grid.

    Example:
        >>> import torch
        >>> from lightning_maml_guard import MetaProblem, phase_diagram
        >>> from lightning_maml_guard.phase.optimizers import SGD
        >>> x = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]])
        >>> data = x, torch.zeros(1, 2, 1)
        >>> loss = lambda params, batch: ((batch[0] @ params["w"] - batch[1]) ** 2).sum()
        >>> problem = MetaProblem({"w": torch.ones(2, 1)}, loss, data, data, order="simplified")
        >>> found = phase_diagram(problem, [0.1, 0.2], [0.5, 5.0], 40, optimizer=SGD(), progress=False)
        >>> found.trained.tolist()
        [[True, False], [True, False]]
    """
    family = as_family(problem_family)
    columns, rows = _axis("alphas", alphas), _axis("betas", betas)
    check_count("steps", steps)
    check_count("max_iter", max_iter)
    if measure_every is not None:
        check_count("measure_every", measure_every, 0)
    if chunk_size is not None:
        check_count("chunk_size", chunk_size)
    check_number("tol", tol, above=0)
    check_number("divergence", divergence, above=0, infinite=True)
    check_number("chance", chance, above=0, infinite=True)
    if memory is not None:
        check_number("memory", memory, above=0)
    check_flag("exact", exact)
    check_flag("progress", progress)
    check_folder("partial", partial)
    if judged_on is not None and not isinstance(judged_on, MetaProblem):
        raise TypeError(
            f"Expected argument `judged_on` to be a MetaProblem or None but got {shown(judged_on)}. Pass the problem "
            "that errors are taken on."
        )
    first = family(0)
    judged = judged_on or first
    like = next(iter(first.params.values()))
    measured = {0, steps} if measure_every is None else set(range(0, steps, measure_every or steps)) | {steps}
    settings = GridSettings(
        family,
        judged,
        meta_optimizer(optimizer),
        steps,
        () if measure_every == 0 else tuple(sorted(measured)),
        exact,
        max_iter,
        tol,
    )
    grid = torch.cartesian_prod(*(torch.from_numpy(each).to(like) for each in (columns, rows))).reshape(-1, 2)
    ranks, rank = _ranks(like.device)
    size = chunk_size or _chunk_size(first, len(grid), memory, ranks)
    chunks = grid.split(size)
    identity = fingerprint(
        columns,
        rows,
        settings.measured_steps,
        [steps, size, max_iter, tol, exact, repr(settings.optimizer)],
        *([each.order, each.inner_steps, each.support, each.query] for each in (first, judged)),
        first.params,
        repr(sorted(first.inner_lr)) if isinstance(first.inner_lr, dict) else "",
        *([] if first.inner_update is None else [repr(first.inner_update)]),
    )
    store = ChunkStore(partial, identity)
    own = range(rank, len(chunks), ranks.size)
    found: dict[int, dict[str, Tensor]] = {}
    with (
        ranks.fail_together(),
        tqdm(total=len(own) * steps, desc="phase diagram", unit="step", disable=not progress or rank > 0) as bar,
    ):
        for index in own:
            alpha, beta = chunks[index].unbind(1)
            found[index] = train_runs(
                settings,
                alpha.contiguous(),
                beta.contiguous(),
                saved=store.load(index),
                save=partial_of(store.save, index),
                advance=bar.update,
            )
        gathered = ranks.gather(found)
    results = {index: each for part in gathered for index, each in part.items()}
    joined = {
        name: np.concatenate([results[index][name].double().numpy() for index in range(len(chunks))], -1)
        for name in results[0]
    }
    shaped = {name: each.reshape(*each.shape[:-1], len(columns), len(rows)) for name, each in joined.items()}
    return PhaseDiagram(
        alphas=columns,
        betas=rows,
        measured_steps=np.array(settings.measured_steps),
        divergence_step=divergence_steps(shaped["losses"], shaped["start"], divergence),
        order=first.order,
        inner_steps=first.inner_steps,
        optimizer=repr(settings.optimizer),
        chance=chance,
        divergence=divergence,
        **shaped,
    )


def _axis(name: str, values: Iterable[float]) -> np.ndarray:
    axis = np.array(check_rates(name, values))
    if not len(axis) or bool((np.diff(axis) <= 0).any()):
        raise ValueError(
            f"Expected argument `{name}` to hold at least one rate, strictly ascending, but got {axis.tolist()}."
        )
    return axis


def _ranks(device: torch.device) -> tuple[Ranks, int]:
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return ProcessGroup(device if device.type == "cuda" else "cpu"), dist.get_rank()
    return Ranks(), 0


def _chunk_size(problem: MetaProblem, runs: int, memory: float | None, ranks: Ranks) -> int:
    fit = runs_at_once(problem, memory)
    # The same on every rank, and equal parts: a last chunk of a few runs would take as long as a full one.
    largest = min([*ranks.gather(fit), -(-runs // ranks.size)])
    parts = -(-runs // largest)
    return -(-runs // parts)
