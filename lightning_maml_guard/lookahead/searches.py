"""The searches for rates of one check: what was tried somewhere on some batches is not tried there again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.optim import Optimizer

from lightning_maml_guard.lookahead.rate_search import RateSearch
from lightning_maml_guard.lookahead.results import TRIAL_STEPS
from lightning_maml_guard.optim.rollback_state import HoldsTensors
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.problems import Problem


class Searches:
    """Makes searches from where a run is, or from a snapshot that is visited, each once.

    Args:
        make: Makes a search on some batches from where the parameters are.
        moves: Counts how often the run itself was moved.
        module: Holds the parameters.
        optimizers: What moves them.
        device: Where they are kept while a snapshot is visited; None: where they are.
    """

    def __init__(
        self,
        make: Callable[[Sequence[Problem]], RateSearch],
        moves: Callable[[], int],
        module: HoldsTensors,
        optimizers: Sequence[Optimizer],
        device: torch.device | str | None = None,
    ) -> None:
        self._make, self._moves, self._place = make, moves, (module, optimizers, device)
        self._snapshot: int | None = None  # the step of the one that is visited
        self._kept: list[Sequence[Problem]] = []  # the batches, so that no others get their identity
        self._known: dict[tuple[int, ...], dict[tuple[bool, int], RateSearch]] = {}

    def on(self, problems: Sequence[Problem], *, alpha_suspect: bool, steps: int = TRIAL_STEPS) -> RateSearch:
        """The search on these batches from where the parameters are."""
        where, kind = -1 - self._moves() if self._snapshot is None else self._snapshot, (alpha_suspect, steps)
        known = self._known.setdefault((where, *map(id, problems)), {})
        if not known:
            self._kept.append(problems)
        if kind not in known:
            other = next(iter(known.values())) if known else self._make(problems)
            known[kind] = other.like_this(*kind)
        return known[kind]

    @contextmanager
    def visited(self, snapshot: Snapshot | None) -> Iterator[None]:
        """Go to a snapshot, and come back; None: stay."""
        if snapshot is None:
            yield
            return
        before, self._snapshot = self._snapshot, snapshot.step
        try:
            with snapshot.visited(*self._place):
                yield
        finally:
            self._snapshot = before
