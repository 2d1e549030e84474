"""Measure the stability of a meta-update: where curvature and theory meet. No Lightning here."""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

import torch
from torch.optim import Optimizer

from lightning_maml_guard.linalg.krylov_basis import BASES
from lightning_maml_guard.linalg.lanczos import NonFiniteProductError
from lightning_maml_guard.maml.batch_errors import explained
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.stability.bench import Options
from lightning_maml_guard.stability.estimators import Estimator, check_estimator
from lightning_maml_guard.stability.hvp import Memory
from lightning_maml_guard.stability.krylov_stopping import ChangingOperatorError, Krylov
from lightning_maml_guard.stability.measurement import Measurement
from lightning_maml_guard.stability.objective import MamlSubject, PlainSubject
from lightning_maml_guard.stability.plain import PlainProblem
from lightning_maml_guard.stability.report import StabilityReport
from lightning_maml_guard.theory.limits import check_margin
from lightning_maml_guard.theory.multiplier import check_rate
from lightning_maml_guard.utils.checks import check_choice, check_count, check_number
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.random_state import preserved_randomness


def measure(
    problem: MetaProblem | PlainProblem,
    *,
    beta: float | None = None,
    optimizer: Optimizer | None = None,
    criterion: str = "simplified",
    estimator: Estimator = "lanczos",
    max_iter: int = 20,
    tol: float = 1e-2,
    tasks: str = "mean",
    data: str = "support",
    margin: float = 1.0,
    step: int | None = None,
    memory: Memory | None = None,
    basis: str = "device",
) -> StabilityReport:
    """Measure whether a problem's learning rates lie in the safe region.

    Estimates the spectrum of the task loss's Hessian and compares ``alpha`` with
    ``alpha_c = 1/lambda_max`` and ``beta`` with ``beta_c = min_i 2/(lambda_i - alpha*lambda_i^2)``, or with
    its counterpart for the optimizer as it runs (``c`` in place of 2, its preconditioner, its weight decay).
    Beside it the largest meta rate of the update *as configured* (``exact_beta_c``: any order, ``K`` steps, many
    tasks) is found from its Jacobian ``J = dG/dtheta``, with ``criterion="exact"`` the one that is judged, as is the
    inner loop's own limit ``alpha < 2/lambda_max``. Parameters, gradients and random states are left as they were.

    Memory beside the training's, for ``n`` parameters of ``s`` bytes, ``T`` tasks and ``K`` inner steps of exact MAML:
    ``max_iter * b * n`` bytes of Lanczos vectors (``b = s`` on the device or with ``basis="cpu"`` on the host, 2 in
    bfloat16) and about ``s * n * (3 + 4*T*(K + 1))`` for the graph of the meta-gradient, one at a time, and a product
    with it; 3 vectors more under an optimizer with a preconditioner or rates by group, 2 in bfloat16, 6 in the first
    measurement for its self-check, and the activations of a training step several times over. An MLP of 10M parameters,
    2 tasks and one step: 20 vectors of 40 MB with ``max_iter=1``. A guard's trial comes before that and is gone by
    then: parameters, optimizer state and two gradients once more, and the graph of a step.

    Args:
        problem: The problem; a ``PlainProblem`` for training without an inner loop.
        beta: Meta rate of plain SGD. Give this or an optimizer, or neither for the critical values alone.
        optimizer: The live optimizer, which holds ``problem.params``.
        criterion: ``"simplified"``: the poster's conditions. ``"exact"``: the Jacobian of the update as configured.
        estimator: ``"lanczos"``, ``"pyhessian"`` or ``(matvec, start vector) -> eigenvalues``.
        max_iter: Lanczos (or power) steps at most.
        tol: Relative residual at which to stop.
        tasks: ``"mean"``: curvature of the mean task loss. ``"worst"``: of the sharpest task.
        data: The loss whose Hessian is measured: ``"support"``, ``"query"`` or ``"both"`` (their mean).
        margin: Fraction of the critical values that counts as the threshold.
        step: Training step, for the messages.
        memory: What earlier measurements of the same network found out; pass one object to every call of a loop, and
            the self-check of the second derivatives is made once.
        basis: Where the Lanczos vectors are kept: ``"device"``, ``"cpu"`` (the same numbers, slower) or ``"bfloat16"``
            (half the memory; what that rounds away widens the intervals).

    Returns:
        The report. Curvature that can't be measured gives ``"unresolved"`` with the reason.

    Raises:
        TypeError: If ``problem`` is neither a MetaProblem nor a PlainProblem, or if ``optimizer`` or ``memory`` is
            something else.
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
    if not isinstance(problem, (MetaProblem, PlainProblem)):
        raise TypeError(
            f"Expected argument `problem` to be a MetaProblem but got {type(problem).__name__}. Pass "
            "MetaProblem(params, task_loss, support, query), or module.meta_problem(batch) of a MetaLearningModule."
        )
    check_options(
        criterion=criterion, estimator=estimator, max_iter=max_iter, tol=tol, tasks=tasks, data=data, basis=basis
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
    if memory is not None and not isinstance(memory, Memory):
        raise TypeError(
            f"Expected argument `memory` to be a Memory or None but got {type(memory).__name__}. Leave it out, or pass "
            "the Memory() of the calls before."
        )
    began = time.perf_counter()
    memory = memory or Memory()
    options = Options(criterion, estimator, Krylov(max_iter, tol, basis), tasks == "worst", margin, step)
    with preserved_randomness(), double_backward():
        torch.manual_seed(0)  # the same dropout masks in every check, so that their numbers can be compared
        if isinstance(problem, PlainProblem):
            measurement = Measurement(PlainSubject(problem), optimizer, beta, options, memory)
        else:
            subject = MamlSubject(problem, data, memory.map_for(problem.task_chunk_size, problem.looped))
            measurement = Measurement(subject, optimizer, beta, options, memory)
        try:
            with explained(problem) if isinstance(problem, MetaProblem) else nullcontext():
                return measurement.report(began)
        except (NonFiniteProductError, ChangingOperatorError) as error:
            return measurement.failed(str(error), began)


def check_options(
    *, criterion: str, estimator: Any, max_iter: int, tol: float, tasks: str, data: str, basis: str
) -> None:
    """Refuse measuring options that are not allowed.

    Args:
        criterion: See :func:`measure`.
        estimator: See :func:`measure`.
        max_iter: See :func:`measure`.
        tol: See :func:`measure`.
        tasks: See :func:`measure`.
        data: See :func:`measure`.
        basis: See :func:`measure`.

    Raises:
        ValueError: If one is not allowed, or if two do not go together.
    """
    for name, value, allowed in (
        ("criterion", criterion, ("simplified", "exact")),
        ("tasks", tasks, ("mean", "worst")),
        ("data", data, ("support", "query", "both")),
        ("basis", basis, BASES),
    ):
        check_choice(name, value, allowed)
    check_estimator(estimator)
    if tasks == "worst" and estimator != "lanczos":
        raise ValueError(
            f"tasks='worst' needs estimator='lanczos' but got {estimator!r}: the others treat one Hessian at a time. "
            "Choose tasks='mean', or leave `estimator` out."
        )
    check_count("max_iter", max_iter)
    check_number("tol", tol, above=0, below=1)
