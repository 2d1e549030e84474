"""A finished phase diagram: what was trained and measured, and what follows from it."""

from __future__ import annotations

import math
import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from lightning_maml_guard.phase.divergence import NEVER
from lightning_maml_guard.theory.correlation import spearman

TRAINED_SHARE = 0.9
# Inner rates that a comparison with what trained takes: one for each third, and as many as Spearman's coefficient.
FEWEST = 3


@dataclass(frozen=True)
class PhaseDiagram:
    """Trainings over a grid of ``A`` inner and ``B`` meta rates, with critical rates at ``M`` steps.

    Attributes:
        alphas: Inner rates, shape ``(A,)``.
        betas: Meta rates, shape ``(B,)``.
        losses: Loss of each step's tasks before the step, shape ``(steps, A, B)``; ``nan`` after a run blew up.
        start: Error before training, shape ``(A, B)``.
        unadapted: Error before training without adaptation, shape ``(A, B)``, the same everywhere.
        final: Error after training, on the same tasks, shape ``(A, B)``; ``inf`` where a run blew up.
        divergence_step: First step at which the loss left, shape ``(A, B)``; -1 where it never did.
        measured_steps: Steps before which the critical rates were measured, shape ``(M,)``.
        alpha_c: The poster's ``1/lambda_max``, shape ``(M, A, B)``; ``nan`` where it could not be measured.
        beta_c: The poster's, at the run's inner rate, for the meta-optimizer that ran; the same shape. 0 where
            ``alpha > alpha_c``.
        exact_beta_c: From the Jacobian of the meta-update as configured; the same shape.
        order: How the meta-gradient was taken.
        inner_steps: Number ``K`` of inner steps.
        optimizer: The meta-optimizer, in words.
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

    @property
    def trained(self) -> np.ndarray:
        """Which runs trained: ended at most at 0.9 of the error before training, with and without adaptation.

        Both, because adaptation at a high rate can make the error before training as large as one likes, and by a
        margin, because a network that its rates have killed sits near the error of its start. Shape ``(A, B)``.
        """
        return self.trained_to(TRAINED_SHARE)

    def trained_to(self, share: float) -> np.ndarray:
        """Say which runs brought the error down to a share of that before training, with and without adaptation.

        Args:
            share: The share; ``trained`` asks for 0.9.

        Returns:
            Shape ``(A, B)``.
        """
        return np.isfinite(self.final) & (self.final <= share * np.minimum(self.start, self.unadapted))

    @property
    def diverged(self) -> np.ndarray:
        """Which runs ended outside: blown up, or left their start for good. Shape ``(A, B)``."""
        return ~np.isfinite(self.final) | ((self.divergence_step != NEVER) & ~self.trained)

    @property
    def largest_beta(self) -> np.ndarray:
        """Largest meta rate of each inner rate that trained, shape ``(A,)``; ``nan`` where none did."""
        return self.largest_beta_to(TRAINED_SHARE)

    def largest_beta_to(self, share: float) -> np.ndarray:
        """Find the largest meta rate of each inner rate that brought the error down to a share.

        Args:
            share: See :meth:`trained_to`.

        Returns:
            Shape ``(A,)``; ``nan`` where none did.
        """
        trained = self.trained_to(share)
        return np.where(trained.any(1), np.where(trained, self.betas, -np.inf).max(1), math.nan)

    def at_start(self, name: str) -> np.ndarray:
        """Read a critical rate before training.

        Args:
            name: ``"alpha_c"``, ``"beta_c"`` or ``"exact_beta_c"``.

        Returns:
            One value an inner rate, shape ``(A,)``; ``nan`` where it was not measured.
        """
        return _least(getattr(self, name)[:1])

    def smallest_along(self, name: str) -> np.ndarray:
        """Read the smallest value of a critical rate along each inner rate's healthy runs (those that trained).

        Args:
            name: ``"alpha_c"``, ``"beta_c"`` or ``"exact_beta_c"``.

        Returns:
            One value an inner rate, shape ``(A,)``; ``nan`` where there is none.
        """
        return _least(np.where(self.trained, getattr(self, name), math.nan))

    def correlation(self, name: str, along: bool = False) -> float:
        """Correlate the largest meta rate that trained with a predicted one, by rank over the inner rates.

        Args:
            name: ``"beta_c"`` or ``"exact_beta_c"``.
            along: The smallest prediction along healthy runs in place of that before training.

        Returns:
            Spearman's coefficient over the columns that have both; ``nan`` for fewer than 3, or without any variation.
        """
        return spearman(*self.paired(name, along))

    def paired(self, name: str, along: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Put a predicted meta rate beside the largest one that trained, where there are both.

        Args:
            name: ``"beta_c"`` or ``"exact_beta_c"``.
            along: The smallest prediction along healthy runs in place of that before training.

        Returns:
            The two, each of shape ``(columns that have both,)``.
        """
        predicted = self.smallest_along(name) if along else self.at_start(name)
        both = np.isfinite(predicted) & np.isfinite(self.largest_beta)
        return predicted[both], self.largest_beta[both]

    def growth_towards_limit(self, limit: float, share: float = TRAINED_SHARE) -> float:
        """Say how much larger the usable meta rates are near a limit of ``alpha`` than far from it: the poster's claim.

        Args:
            limit: The limit, ``alpha_c`` say.
            share: What counts as trained; see :meth:`trained_to`.

        Returns:
            Mean of ``log10`` of the largest meta rate that trained over the upper third of the inner rates up to the
            limit, less that over the lower third. Positive: they grow, as the poster says; ``nan`` if fewer than 3
            columns below the limit trained.
        """
        inside = self.trained_up_to(limit, share)
        if len(inside) < FEWEST:
            return math.nan
        third = len(inside) // 3
        logs = np.log10(inside)
        return float(logs[-third:].mean() - logs[:third].mean())

    def trained_up_to(self, limit: float, share: float = TRAINED_SHARE) -> np.ndarray:
        """List the largest meta rates that trained at the inner rates up to a limit.

        Args:
            limit: The limit; ``inf`` for all inner rates.
            share: What counts as trained; see :meth:`trained_to`.

        Returns:
            One for each of these inner rates at which any trained, in their order.
        """
        largest = self.largest_beta_to(share)
        return largest[(self.alphas <= limit) & np.isfinite(largest)]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the diagram to an npz file, all of it or nothing.

        Args:
            path: Where to.
        """
        target = Path(path)
        handle, temporary = tempfile.mkstemp(suffix=".npz", dir=target.resolve().parent)
        with os.fdopen(handle, "wb") as stream:
            arrays: dict[str, Any] = {each.name: np.asarray(getattr(self, each.name)) for each in fields(self)}
            np.savez_compressed(stream, **arrays)
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PhaseDiagram:
        """Read a diagram that :meth:`save` wrote.

        Args:
            path: Where from.

        Returns:
            The diagram.

        Raises:
            ValueError: If the file holds no phase diagram.
        """
        with np.load(path, allow_pickle=False) as archive:
            missing = [each.name for each in fields(cls) if each.name not in archive]
            if missing:
                raise ValueError(f"{path} is no phase diagram: it lacks {missing}. Write one with PhaseDiagram.save.")
            values: dict[str, Any] = {each.name: archive[each.name] for each in fields(cls)}
        values |= {
            "order": str(values["order"]),
            "inner_steps": int(values["inner_steps"]),
            "optimizer": str(values["optimizer"]),
        }
        return cls(**values)


def _least(values: np.ndarray) -> np.ndarray:
    """Smallest value that is not nan, over steps and meta rates."""
    if not len(values):
        return np.full(values.shape[1], math.nan)
    least = np.where(np.isnan(values), math.inf, values).min(axis=(0, 2))
    return np.where(np.isnan(values).all(axis=(0, 2)), math.nan, least)
