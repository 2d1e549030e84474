"""The largest learning rates that converge, or train, found by training many rates at once and bisecting."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from lightning_maml_guard.linalg.layout import rows_of
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.phase.gradients import copies, grid_gradient
from lightning_maml_guard.phase.optimizers import SGD, MetaOptimizer, Params, meta_optimizer
from lightning_maml_guard.phase.result import TRAINED_SHARE, PhaseDiagram
from lightning_maml_guard.phase.train import GridSettings, as_family, train_runs
from lightning_maml_guard.utils.checks import check_count

# A run whose meta-gradient has shrunk to this share of its start has converged; what follows is rounding.
_CONVERGED = 1e-10
# Rates that a round of the search for a critical rate trains at once.
_POINTS = 16


def converges(problem: MetaProblem, alphas: Tensor, betas: Tensor, steps: int) -> np.ndarray:
    """Train by SGD on the same tasks at every step; return True for the runs that converge, shape ``(runs,)``."""
    stepper = SGD()
    params = copies(problem.params, len(alphas))
    state = stepper.init(params)
    norms: dict[int, Tensor] = {}
    # Traced once to plain operations, as the problem is the same at every step: a fifth of the time, bit for bit.
    gradient = make_fx(lambda theta: grid_gradient(problem, theta, alphas)[0])(params)
    gradient.graph.eliminate_dead_code()
    gradient.recompile()
    for step in range(steps):
        gradients = gradient(params)
        if step in {0, steps // 2, steps - 1}:
            norms[step] = _norm(gradients)
        params, state = stepper.step(params, gradients, state, betas, step)
    first, middle, last = (norms[step].cpu().numpy() for step in (0, steps // 2, steps - 1))
    # Near a rate's limit the one direction that decides grows or shrinks by less than a thousandth per step, long after
    # all others have vanished: so the end is compared with half-way.
    return np.isfinite(last) & ((last < middle) | (last <= _CONVERGED * first))


def critical_betas(
    problem: MetaProblem,
    alphas: Sequence[float],
    low: float,
    high: float,
    *,
    steps: int = 4000,
    relative: float = 1e-4,
) -> np.ndarray:
    """Find the largest outer learning rate at which SGD converges, at each inner one.

    ``low`` is an outer rate that converges at each inner rate, ``high`` one that converges at none. Every round trains
    some outer rates between the two at once, until ``high / low <= 1 + relative``. Returned are the largest rate found
    to converge and the smallest found not to, shape ``(A, 2)``.
    """
    like = next(iter(problem.params.values()))
    columns = like.new_tensor(list(alphas))

    def converge(betas: np.ndarray) -> np.ndarray:
        each = torch.from_numpy(betas).to(like)
        by_run = columns.repeat_interleave(betas.shape[1])
        return converges(problem, by_run, each.reshape(-1), steps).reshape(betas.shape)

    return _bisect(converge, len(columns), low, high, relative, _POINTS, "outer learning rate")


def critical_alpha(
    problem: MetaProblem,
    beta: float,
    low: float,
    high: float,
    *,
    steps: int = 4000,
    relative: float = 1e-4,
) -> tuple[float, float]:
    """Find the largest inner learning rate at which a small outer rate converges; see :func:`critical_betas`."""
    like = next(iter(problem.params.values()))

    def converge(alphas: np.ndarray) -> np.ndarray:
        each = torch.from_numpy(alphas).to(like).reshape(-1)
        return converges(problem, each, torch.full_like(each, beta), steps).reshape(alphas.shape)

    ((inside, outside),) = _bisect(converge, 1, low, high, relative, _POINTS, "inner learning rate")
    return float(inside), float(outside)


def border(
    problem_family: MetaProblem | Callable[[int], MetaProblem],
    diagram: PhaseDiagram,
    alpha: float,
    *,
    optimizer: str | MetaOptimizer = "sgd",
    judged_on: MetaProblem | None = None,
    relative: float = 0.05,
    points: int = 3,
    share: float = TRAINED_SHARE,
) -> tuple[float, float]:
    """Refine a column of a phase diagram: bisect between its largest outer rate that trained and the next one.

    Every round trains ``points`` outer rates between the two at once, for as many steps as the diagram did.

    Args:
        problem_family: As :func:`~lightning_maml_guard.phase_diagram` was given it.
        diagram: The diagram.
        alpha: The column: the inner rate of the diagram nearest to this one.
        optimizer: As it was given it.
        judged_on: As it was given it.
        relative: Stops once the two rates differ by no more than this share.
        points: Outer rates per round.
        share: What counts as trained; see :meth:`PhaseDiagram.trained_to`.

    Returns:
        The largest outer rate found to train, and the smallest found not to. Of a column with gaps, those at the first.

    Raises:
        ValueError: If no outer rate of the column trained, or the largest of them did, or a run does not end as the
            diagram says.

    Example:
        >>> import torch
        >>> from lightning_maml_guard import MetaProblem, phase_diagram
        >>> from lightning_maml_guard.phase.bisection import border
        >>> data = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]]), torch.zeros(1, 2, 1)
        >>> loss = lambda params, batch: ((batch[0] @ params["w"] - batch[1]) ** 2).sum()
        >>> problem = MetaProblem({"w": torch.ones(2, 1)}, loss, data, data, order="simplified")
        >>> found = phase_diagram(problem, [0.1, 0.2], [0.5, 5.0], 40, measure_every=0, progress=False)
        >>> [round(rate, 2) for rate in border(problem, found, 0.1)]  # beta_c = 2/(2 - 0.1 * 4) = 1.25
        [1.23, 1.27]
    """
    column = int(np.abs(diagram.alphas - alpha).argmin())
    trained = np.flatnonzero(diagram.trained_to(share)[column])
    gaps = np.flatnonzero(np.diff(trained) > 1)
    last = int(trained[gaps[0] if len(gaps) else -1]) if len(trained) else -1
    if not 0 <= last < len(diagram.betas) - 1:
        what = "no outer learning rate trained" if last < 0 else "the largest outer learning rate trained"
        raise ValueError(
            f"There is no border in the column alpha={diagram.alphas[column]:g}: {what}. Draw a diagram with "
            f"{'lower' if last < 0 else 'higher'} `betas`."
        )
    family = as_family(problem_family)
    first = family(0)
    settings = GridSettings(family, judged_on or first, meta_optimizer(optimizer), len(diagram.losses), ())
    like = next(iter(first.params.values()))

    def trains(betas: np.ndarray) -> np.ndarray:
        each = torch.from_numpy(betas).to(like).reshape(-1)
        found = train_runs(settings, torch.full_like(each, float(diagram.alphas[column])), each)
        least = torch.minimum(found["start"], found["unadapted"])
        return (torch.isfinite(found["final"]) & (found["final"] <= share * least)).numpy().reshape(betas.shape)

    low, high = diagram.betas[last : last + 2]
    ((inside, outside),) = _bisect(trains, 1, float(low), float(high), relative, points, "outer learning rate")
    return float(inside), float(outside)


def _bisect(
    converge: Callable[[np.ndarray], np.ndarray],
    columns: int,
    low: float,
    high: float,
    relative: float,
    points: int,
    rate: str,
) -> np.ndarray:
    check_count("points", points)
    if not 0 < low < high or not relative > 0:
        raise ValueError(
            f"Expected 0 < `low` < `high` and `relative` above 0 but got low={low!r}, high={high!r}, "
            f"relative={relative!r}."
        )
    bracket = np.tile([float(low), float(high)], (columns, 1))
    ends = converge(bracket)
    if not ends[:, 0].all():
        raise ValueError(f"The {rate} low={low:g} does not converge everywhere: give a lower one.")
    if ends[:, 1].any():
        raise ValueError(f"The {rate} high={high:g} still converges somewhere: give a higher one, or more `steps`.")
    while (bracket[:, 1] / bracket[:, 0]).max() > 1 + relative:
        inner = np.exp(np.linspace(np.log(bracket[:, 0]), np.log(bracket[:, 1]), points + 2, axis=1))
        found = converge(inner[:, 1:-1])
        # The first that fails ends the bracket.
        failed = np.concatenate([~found, np.ones((columns, 1), dtype=bool)], 1).argmax(1)
        bracket = np.stack([inner[np.arange(columns), failed], inner[np.arange(columns), failed + 1]], 1)
    return bracket


def _norm(gradients: Params) -> Tensor:
    squares = [rows_of(each).square().sum(1) for each in gradients.values()]
    return torch.stack(squares).sum(0).sqrt()
