"""Measure the stability of a meta-update: where curvature and theory meet. No Lightning here."""

from __future__ import annotations

import math
from contextlib import ExitStack, nullcontext
from typing import Any

from torch import Tensor

from lightning_maml_guard.linalg.lanczos import NonFiniteProductError
from lightning_maml_guard.maml.batch_errors import explained, has_nan
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.messages.reasons import Reason
from lightning_maml_guard.optim.stability_limits import Optimizers, listed
from lightning_maml_guard.stability.hvp import MeasurementCache, facts_of
from lightning_maml_guard.stability.krylov_stopping import ChangingOperatorError
from lightning_maml_guard.stability.measurement import Measurement
from lightning_maml_guard.stability.objective import objective_of
from lightning_maml_guard.stability.options import CurvatureOptions, check_curvature
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem, first_batch
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.stability.training_match import TrainingMatch, check_reference
from lightning_maml_guard.theory.limits import check_margin
from lightning_maml_guard.theory.multiplier import check_rate
from lightning_maml_guard.utils.checks import check_count
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.isolation import isolated
from lightning_maml_guard.utils.random_state import preserved_randomness, seed_generators
from lightning_maml_guard.utils.reachable import modules_of


def measure(
    problem: MetaProblem | PlainProblem | AccumulatedProblem,
    *,
    beta: float | None = None,
    optimizer: Optimizers | None = None,
    curvature: CurvatureOptions = CurvatureOptions(),  # noqa: B008 (frozen)
    margin: float = 1.0,
    step: int | None = None,
    cache: MeasurementCache | None = None,
    check_against: Tensor | float | None = None,
) -> StabilityReport:
    """Measure whether a problem's learning rates lie in the safe region.

    Estimates the spectrum of the task loss's Hessian and compares ``alpha`` with
    ``alpha_c = 1/lambda_max`` and ``beta`` with ``beta_c = min_i 2/(lambda_i - alpha*lambda_i^2)``, or with
    its counterpart for the optimizer as it runs (``c`` in place of 2, its preconditioner, its weight decay).
    Beside it the largest outer rate of the update *as configured* (``exact_beta_c``: any order, ``K`` steps, many
    tasks) is found from its Jacobian ``J = dG/dtheta``. By default (``criterion="exact"``) that one is judged, and the
    inner loop's own limit, ``alpha < 2/lambda_max`` for exact MAML. Parameters, gradients and random states are left as
    they were, and so are the buffers, modes and attributes of modules that the loss calls.

    Memory beside the training's, for ``n`` parameters of ``s`` bytes, ``T`` tasks and ``K`` inner steps of exact MAML:
    ``max_iter * b * n`` bytes of Lanczos vectors (``b = s`` on the device or with ``basis="cpu"`` on the host, 2 in
    bfloat16) and about ``s * n * (3 + 4*T*(K + 1))`` for the graph of the meta-gradient, one at a time, and a product
    with it; 3 vectors more under an optimizer with a preconditioner or rates by group, 2 in bfloat16, 6 in the first
    measurement for its self-check, and the activations of a training step several times over. An MLP of 10M parameters,
    2 tasks and one step: 20 vectors of 40 MB with ``max_iter=1``. A guard's lookahead comes before that and is gone by
    then: parameters, optimizer state and two gradients once more, and the graph of a step.

    Args:
        problem: The problem; a ``PlainProblem`` for training without an inner loop.
        beta: Outer rate of plain SGD. Give this or an optimizer, or neither for the critical values alone.
        optimizer: The live optimizer, which holds ``problem.params``; or several that step together: their rates and
            preconditioners apply to their own parameters, and ``beta`` is the largest rate.
        curvature: How to measure; see :class:`~lightning_maml_guard.CurvatureOptions`.
        margin: Fraction of the critical values that counts as the threshold.
        step: Training step, for the messages.
        cache: What earlier measurements of the same network found out, a :class:`MeasurementCache`, which a guard keeps
            for its run. Without one a process checks the second derivatives of a network once for each kind of problem.
        check_against: The loss of training on the same batch. If the problem's is another one, ``notes`` of the report
            hold why that may be.

    Returns:
        The report. Curvature that can't be measured gives ``"unresolved"`` with the reason.

    Raises:
        TypeError: If ``problem`` is neither a MetaProblem nor a PlainProblem, or if ``optimizer``, ``curvature``,
            ``cache`` or ``check_against`` is something else.
        ValueError: If another argument is not allowed.
        BatchError: If the network or the loss can't take the problem's data.

    Example:
        >>> import torch
        >>> from lightning_maml_guard import MetaProblem, measure
        >>> data = torch.tensor([[[1.0, 0.0], [0.0, 0.5]]]), torch.zeros(1, 2, 1)
        >>> loss = lambda params, task: ((task[0] @ params["w"] - task[1]) ** 2).sum()
        >>> problem = MetaProblem({"w": torch.ones(2, 1)}, loss, data, data, inner_lr=0.1, order="simplified")
        >>> report = measure(problem, beta=2.0)
        >>> round(report.alpha_c, 3), round(report.beta_c, 3), report.status
        (0.5, 1.25, 'unsafe')
    """
    one = _check_arguments(problem, beta, optimizer, curvature, margin, step, cache)
    reference = None if check_against is None else check_reference(check_against)
    modules = modules_of(one.task_loss if isinstance(one, MetaProblem) else one.loss)
    whole, cache, share = problem, cache or MeasurementCache(facts_of(one, modules)), 1.0
    if not isinstance(problem, PlainProblem) and curvature.max_tasks is not None:
        part = problem.part(curvature.max_tasks)
        problem, share = part, part.tasks / problem.tasks
    with ExitStack() as isolation, preserved_randomness(), double_backward():
        for module in modules:
            isolation.enter_context(isolated(module))
        seed_generators()  # in every check, so that their numbers can be compared
        task_map = cache.map_of(one)
        objective = objective_of(problem, curvature.data, task_map)
        mismatch: Reason | None = None
        with explained(one) if isinstance(one, MetaProblem) else nullcontext():
            if reference is not None:
                match = TrainingMatch(whole, objective_of(whole, curvature.data, task_map), listed(optimizer or ()))
                mismatch = match.finish(reference)
        measurement = Measurement(
            objective,
            optimizer,
            beta,
            curvature,
            cache,
            margin=margin,
            step=step,
            tasks_share=share,
            notes=() if mismatch is None else (mismatch,),
        )
        try:
            with explained(one) if isinstance(one, MetaProblem) else nullcontext():
                return measurement.report()
        except (NonFiniteProductError, ChangingOperatorError) as error:
            padded = isinstance(error, NonFiniteProductError) and isinstance(one, MetaProblem) and has_nan(one)
            return measurement.failed(error, padded=padded)


def _check_arguments(
    problem: Any, beta: Any, optimizer: Any, curvature: Any, margin: Any, step: Any, cache: Any
) -> MetaProblem | PlainProblem:
    """Raise a TypeError or ValueError if an argument of :func:`measure` is not allowed; return the first batch."""
    if not isinstance(problem, (MetaProblem, PlainProblem, AccumulatedProblem)):
        raise TypeError(
            f"Expected argument `problem` to be a MetaProblem but got {type(problem).__name__}. Pass "
            "MetaProblem(params, task_loss, support, query), or module.meta_problem(batch) of a MetaLearningModule."
        )
    check_curvature(curvature)
    one = first_batch(problem)
    if curvature.criterion == "simplified" and getattr(one, "inner_update", None) is not None:
        raise ValueError(
            "criterion='simplified' is about an inner loop of gradient descent, but the problem has an `inner_update`. "
            "Leave criterion at 'exact'."
        )
    check_margin(margin)
    if beta is not None:
        check_rate(beta, "beta")
        if optimizer is not None:
            raise ValueError(
                "Expected `beta` or `optimizer` but got both: the optimizer holds its own rate. Leave `beta` out."
            )
    if step is not None:
        check_count("step", step, 0)
    if cache is not None and not isinstance(cache, MeasurementCache):
        raise TypeError(
            f"Expected argument `cache` to be a MeasurementCache or None but got {type(cache).__name__}. Leave it out, "
            "or pass the MeasurementCache() of the calls before."
        )
    return one


# Beyond the inner rate as configured, a decade in six steps.
_BORDER = tuple(10 ** (k / 6) for k in range(1, 7))


def measure_border(
    problem: MetaProblem,
    *,
    beta: float | None = None,
    optimizer: Optimizers | None = None,
    curvature: CurvatureOptions = CurvatureOptions(),  # noqa: B008 (frozen)
) -> list[StabilityReport]:
    """Measure the critical outer rate at inner rates up to ten times the configured one, for a picture of the region.

    It costs up to six measurements.

    Args:
        problem: The problem, such as ``module.meta_problem(batch)``.
        beta: Outer rate of plain SGD; see :func:`measure`.
        optimizer: The live optimizer.
        curvature: How to measure.

    Returns:
        A report per inner rate, ascending, as far as the inner rate is below its own limit and ``beta_c`` is known:
        what ``guard.plot(border=...)`` and ``plots.safe_region(..., border=...)`` draw.

    Raises:
        TypeError: If ``problem`` has no inner loop, or as :func:`measure` does.
        ValueError: As :func:`measure` does.
        BatchError: As :func:`measure` does.
    """
    if not isinstance(problem, MetaProblem):
        raise TypeError(
            f"Expected argument `problem` to be a MetaProblem but got {type(problem).__name__}. Plain training has no "
            "inner rate, so that there is no border to draw."
        )
    found: list[StabilityReport] = []
    cache = MeasurementCache()
    for factor in _BORDER:
        scaled = problem.at_factor(factor)
        report = measure(scaled, beta=beta, optimizer=optimizer, curvature=curvature, cache=cache)
        if report.alpha_ratio > 1 or not math.isfinite(report.beta_c):
            break
        found.append(report)
    return found
