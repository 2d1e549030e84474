"""A finished phase diagram: what was trained and measured, and what follows from it."""

from __future__ import annotations

import math
import os
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, NamedTuple

import numpy as np

from lightning_maml_guard.phase.divergence import NEVER
from lightning_maml_guard.utils.io import write_atomically

TRAINED_SHARE = 0.9
# Inner learning rates that a comparison with what trained needs: one for each third, and 3 for a rank correlation.
FEWEST = 3


class Gain(NamedTuple):
    """How the largest outer rate that trained grows with ``alpha``, in decades over that at ``smallest_alpha``.

    Attributes:
        peak: Growth to the largest of them.
        peak_alpha: Smallest inner rate that has it.
        at_largest_alpha: Growth to ``largest_alpha``.
        smallest_alpha: Smallest inner rate above 0 at which any outer rate trained.
        largest_alpha: Largest inner rate at which any trained.
    """

    peak: float
    peak_alpha: float
    at_largest_alpha: float
    smallest_alpha: float
    largest_alpha: float


@dataclass(frozen=True)
class PhaseDiagram:
    """Trainings over a grid of ``A`` inner and ``B`` outer learning rates, with critical rates at ``M`` steps.

    Attributes:
        alphas: Inner learning rates, shape ``(A,)``.
        betas: Outer learning rates, shape ``(B,)``.
        losses: Loss of each step's tasks before the step, shape ``(steps, A, B)``; ``nan`` after a run blew up.
        start: Error before training, shape ``(A, B)``.
        unadapted: Error before training without adaptation, shape ``(A, B)``, the same everywhere.
        final: Error after training, on the same tasks, shape ``(A, B)``; ``inf`` where a run blew up.
        divergence_step: First step at which the loss diverged, shape ``(A, B)``; -1 where it never did.
        measured_steps: Steps before which the critical rates were measured, shape ``(M,)``.
        alpha_c: By the simplified criterion, ``1/(K*lambda_max)``, shape ``(M, A, B)``; ``nan`` where it could not be
            measured.
        beta_c: By the simplified criterion, at the run's inner learning rate, for the meta-optimizer that ran; the
            same shape. 0 where ``alpha > alpha_c``.
        exact_beta_c: From the Jacobian of the meta-update as configured; the same shape.
        order: How the meta-gradient was taken.
        inner_steps: Number ``K`` of inner steps.
        optimizer: The meta-optimizer, as ``repr`` shows it.
        chance: Error that is reached without learning, such as ``log(n)`` for n classes; ``inf`` if there is none.
        divergence: A run has diverged when its loss exceeds this many times its start.
    """

    alphas: np.ndarray
    betas: np.ndarray
    losses: np.ndarray
    start: np.ndarray
    unadapted: np.ndarray
    final: np.ndarray
    divergence_step: np.ndarray
    measured_steps: np.ndarray
    alpha_c: np.ndarray
    beta_c: np.ndarray
    exact_beta_c: np.ndarray
    order: str
    inner_steps: int
    optimizer: str
    chance: float = math.inf
    divergence: float = 5.0
    trained_share: ClassVar[float] = TRAINED_SHARE

    @property
    def trained(self) -> np.ndarray:
        """Which runs trained, shape ``(A, B)``: their final error is at most 0.9 of that before training.

        This must hold for the error with and without adaptation, because adaptation at a high rate can make the error
        before training arbitrarily large, and for ``chance``, because an untrained network can be worse than that. The
        margin is there because a network whose units have died stays near the error of its start.
        """
        return self.trained_to(TRAINED_SHARE)

    def trained_to(self, share: float) -> np.ndarray:
        """Compare the final error with a share of that before training, with and without adaptation, and of chance.

        Args:
            share: The share; ``trained`` uses 0.9.

        Returns:
            True where the final error is at most that, shape ``(A, B)``.
        """
        before = np.minimum(np.minimum(self.start, self.unadapted), self.chance)
        return np.isfinite(self.final) & (self.final <= share * before)

    @property
    def diverged(self) -> np.ndarray:
        """Which runs blew up or diverged and did not train, shape ``(A, B)``."""
        return ~np.isfinite(self.final) | ((self.divergence_step != NEVER) & ~self.trained)

    @property
    def largest_beta(self) -> np.ndarray:
        """Largest outer learning rate that trained at each inner one, shape ``(A,)``; ``nan`` where none did."""
        return self.largest_beta_to(TRAINED_SHARE)

    def largest_beta_to(self, share: float) -> np.ndarray:
        """Find the largest outer learning rate that brought the error down to a share, at each inner one.

        Args:
            share: See :meth:`trained_to`.

        Returns:
            Shape ``(A,)``; ``nan`` where none did.
        """
        trained = self.trained_to(share)
        return np.where(trained.any(1), np.where(trained, self.betas, -np.inf).max(1), math.nan)

    @property
    def contiguous_beta(self) -> np.ndarray:
        """Largest outer rate up to which all trained at each inner one, shape ``(A,)``; ``nan`` where none did."""
        count = np.logical_and.accumulate(self.trained, axis=1).sum(1)
        return np.where(count > 0, self.betas[np.maximum(count, 1) - 1], math.nan)

    def at_start(self, name: str) -> np.ndarray:
        """Look up a critical rate before training.

        Args:
            name: ``"alpha_c"``, ``"beta_c"`` or ``"exact_beta_c"``.

        Returns:
            One value per inner learning rate, shape ``(A,)``; ``nan`` where it was not measured.
        """
        return _least(getattr(self, name)[:1])

    def smallest_along(self, name: str) -> np.ndarray:
        """Find the smallest value of a critical rate over the steps of the runs that trained.

        Args:
            name: ``"alpha_c"``, ``"beta_c"`` or ``"exact_beta_c"``.

        Returns:
            One value per inner learning rate, shape ``(A,)``; ``nan`` where no run trained.
        """
        return _least(np.where(self.trained, getattr(self, name), math.nan))

    def correlation(self, name: str, along: bool = False) -> float:
        """Compute the rank correlation of the largest outer rate that trained and a predicted limit.

        Args:
            name: ``"beta_c"`` or ``"exact_beta_c"``.
            along: Predict by :meth:`smallest_along` instead of :meth:`at_start`.

        Returns:
            Spearman's coefficient over the inner learning rates that have both; ``nan`` for fewer than 3, or if either
            does not vary.
        """
        return _spearman(*self.paired(name, along))

    def paired(self, name: str, along: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Pair a predicted limit with the largest outer rate that trained, at the inner rates that have both.

        Args:
            name: ``"beta_c"`` or ``"exact_beta_c"``.
            along: Predict by :meth:`smallest_along` instead of :meth:`at_start`.

        Returns:
            The predicted and the trained rates, each of shape ``(inner rates that have both,)``.
        """
        predicted = self.smallest_along(name) if along else self.at_start(name)
        both = np.isfinite(predicted) & np.isfinite(self.largest_beta)
        return predicted[both], self.largest_beta[both]

    def gain(self, share: float = TRAINED_SHARE) -> Gain:
        """Measure how far the largest usable outer rate grows with ``alpha``, which Takagi et al. say it does.

        Args:
            share: What counts as trained; see :meth:`trained_to`.

        Returns:
            The growth in decades, from the smallest ``alpha`` above 0 at which any outer rate trained; ``nan`` if none
            trained at fewer than 3 of these inner rates.
        """
        largest = self.largest_beta_to(share)
        usable = (self.alphas > 0) & np.isfinite(largest)
        if usable.sum() < FEWEST:
            return Gain(math.nan, math.nan, math.nan, math.nan, math.nan)
        alphas, decades = self.alphas[usable], np.log10(largest[usable])
        decades -= decades[0]
        top = int(decades.argmax())
        return Gain(*(float(each) for each in (decades[top], alphas[top], decades[-1], alphas[0], alphas[-1])))

    @property
    def beta_without_adaptation(self) -> float:
        """Largest outer learning rate at ``alpha = 0`` below the smallest that diverged there.

        ``nan`` if the grid has no ``alpha = 0``, or if none or all of its outer rates diverged there.
        """
        diverged = self.diverged[self.alphas == 0].any(0)
        first = int(diverged.argmax()) if diverged.any() else 0
        return float(self.betas[first - 1]) if first else math.nan

    @property
    def best_beta(self) -> np.ndarray:
        """Outer learning rate of the run with the smallest final error at each inner one, shape ``(A,)``.

        ``nan`` where none trained.
        """
        return np.where(self.trained.any(1), self.betas[self._best], math.nan)

    def at_end_of_best(self, name: str) -> np.ndarray:
        """Look up a critical rate after training, in the run of :attr:`best_beta` at each inner learning rate.

        Args:
            name: ``"alpha_c"``, ``"beta_c"`` or ``"exact_beta_c"``.

        Returns:
            Shape ``(A,)``; ``nan`` where none trained or it was not measured.
        """
        values = getattr(self, name)
        if not len(values):
            return np.full(len(self.alphas), math.nan)
        return np.where(self.trained.any(1), values[-1, np.arange(len(self.alphas)), self._best], math.nan)

    @property
    def _best(self) -> np.ndarray:
        return np.where(self.trained, self.final, math.inf).argmin(1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the diagram to an npz file, replacing it only once all is written.

        Args:
            path: The file to write.
        """
        arrays: dict[str, Any] = {each.name: np.asarray(getattr(self, each.name)) for each in fields(self)}
        write_atomically(path, lambda stream: np.savez_compressed(stream, **arrays), mode=0o644)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PhaseDiagram:
        """Read a diagram that :meth:`save` wrote.

        Args:
            path: The file to read.

        Returns:
            The diagram.

        Raises:
            ValueError: If the file holds no phase diagram.
        """
        opened: Any = np.load(path, allow_pickle=False)
        if isinstance(opened, np.ndarray):
            raise ValueError(f"{path} is no phase diagram but one array. Write one with PhaseDiagram.save.")
        with opened as archive:
            missing = [each.name for each in fields(cls) if each.name not in archive and each.default is MISSING]
            if missing:
                raise ValueError(f"{path} is no phase diagram: it lacks {missing}. Write one with PhaseDiagram.save.")
            values: dict[str, Any] = {each.name: archive[each.name] for each in fields(cls) if each.name in archive}
        values |= {name: float(values[name]) for name in ("chance", "divergence") if name in values}
        values |= {
            "order": str(values["order"]),
            "inner_steps": int(values["inner_steps"]),
            "optimizer": str(values["optimizer"]),
        }
        return cls(**values)


def _least(values: np.ndarray) -> np.ndarray:
    """Smallest value that is not nan, over steps and outer rates."""
    if not len(values):
        return np.full(values.shape[1], math.nan)
    least = np.where(np.isnan(values), math.inf, values).min(axis=(0, 2))
    return np.where(np.isnan(values).all(axis=(0, 2)), math.nan, least)


def _spearman(one: np.ndarray, other: np.ndarray) -> float:
    # Not torchmetrics' spearman_corrcoef, which computes in float32 with an epsilon: the coefficient of 3 pairs in
    # reversed order is -0.9999985 there.
    first, second = _average_ranks(one), _average_ranks(other)
    if len(first) < FEWEST or np.ptp(first) == 0 or np.ptp(second) == 0:
        return math.nan
    return float(np.corrcoef(first, second)[0, 1])


def _average_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1; equal values share the mean of their ranks."""
    _, group, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[group]
