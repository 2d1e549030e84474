"""CurvatureOptions: how curvature is measured, shared by the guard, ``measure`` and ``suggest_rates``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_maml_guard.linalg.krylov_basis import BASES
from lightning_maml_guard.stability.estimators import check_estimator, estimates_per_task
from lightning_maml_guard.stability.krylov_stopping import Krylov
from lightning_maml_guard.utils.checks import check_choice, check_count, check_number

# Spelled out, because LightningCLI reads the type from here.
Estimator = str | Callable[[Callable[[Tensor], Tensor], Tensor], Sequence[float]]


@dataclass(frozen=True)
class CurvatureOptions:
    """How curvature is measured.

    Args:
        criterion: Whose conditions are judged. ``"exact"``: the Jacobian of the update as configured, and the inner
            loop's own limit. ``"simplified"``: those of Takagi et al., for simplified MAML.
        estimator: ``"lanczos"``, ``"pyhessian"`` or ``(matvec, start vector) -> eigenvalues``.
        max_iter: Lanczos (or power) steps at most.
        tol: Relative residual at which to stop, between 0 and 1. From 1e-2 on, a run ends once its verdict is certain
            (``criterion="exact"``): a limit is known to 10 %, or to a factor of 1.5 where the rate is certainly below
            half of it or above twice of it (that of exact MAML's outer rate to a factor of 4 where the rate is below
            half of it); their intervals say so.
        tasks: Curvature of the ``"mean"`` task loss, or of the ``"worst"`` (sharpest) task.
        data: The loss whose Hessian is measured: ``"support"``, ``"query"`` or ``"both"`` (their mean).
        basis: Where the Lanczos vectors are kept, ``max_iter`` at most: ``"device"``, ``"cpu"`` (the same numbers,
            slower) or ``"bfloat16"`` (half the memory; what that rounds away widens the intervals).
        max_tasks: Measure on so many tasks of the batch (the first ones) instead of all: a few are cheaper, and their
            mean is sharper than that of all.

    Raises:
        ValueError: If a value is not allowed, or if two do not go together.

    Example:
        >>> from lightning_maml_guard import ConvergenceGuard, CurvatureOptions
        >>> ConvergenceGuard(curvature=CurvatureOptions(max_iter=40)).curvature.tol
        0.01
    """

    criterion: str = "exact"
    estimator: Estimator = "lanczos"
    max_iter: int = 20
    tol: float = 1e-2
    tasks: str = "mean"
    data: str = "support"
    basis: str = "device"
    max_tasks: int | None = None

    def __post_init__(self) -> None:
        for name, allowed in (
            ("criterion", ("simplified", "exact")),
            ("tasks", ("mean", "worst")),
            ("data", ("support", "query", "both")),
            ("basis", BASES),
        ):
            check_choice(name, getattr(self, name), allowed)
        check_estimator(self.estimator)
        if self.tasks == "worst" and not estimates_per_task(self.estimator):
            raise ValueError(
                f"tasks='worst' needs estimator='lanczos' but got {self.estimator!r}: the others treat one Hessian at "
                "a time. Choose tasks='mean', or leave `estimator` out."
            )
        check_count("max_iter", self.max_iter)
        check_number("tol", self.tol, above=0, below=1)
        if self.max_tasks is not None:
            check_count("max_tasks", self.max_tasks)

    @property
    def krylov(self) -> Krylov:
        """How far a Krylov run goes."""
        return Krylov(self.max_iter, self.tol, self.basis)


def check_curvature(value: Any) -> None:
    """Raise a TypeError if a value is no CurvatureOptions."""
    if not isinstance(value, CurvatureOptions):
        raise TypeError(
            f"Expected argument `curvature` to be a CurvatureOptions but got {type(value).__name__}. Pass "
            "CurvatureOptions(max_iter=40), say, with the options that differ from their defaults."
        )
