"""What a measurement works with: subject, optimizer, options, and the operators it builds on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from torch.optim import Optimizer

from lightning_maml_guard.linalg.lanczos import NonFiniteProductError
from lightning_maml_guard.linalg.operators import Operator
from lightning_maml_guard.optim.linearized_step import outer_step
from lightning_maml_guard.optim.lr_cap import scheduled_rate
from lightning_maml_guard.stability.budget import CURVATURE, UPDATE, Price
from lightning_maml_guard.stability.estimators import Estimator
from lightning_maml_guard.stability.hvp import SELF_CHECK, Memory, make_operator
from lightning_maml_guard.stability.krylov_stopping import ChangingOperatorError, Krylov
from lightning_maml_guard.stability.objective import MamlSubject, Subject, Target

T = TypeVar("T")

# What the operators are called, in messages too.
HESSIAN, META_UPDATE = "Hessian", "meta-update"


@dataclass(frozen=True)
class Options:
    """How to measure; see :func:`lightning_maml_guard.measure`."""

    criterion: str
    estimator: Estimator
    krylov: Krylov
    worst: bool
    margin: float
    step: int | None


class Bench:
    """One subject, one optimizer, and the operators made of them.

    Args:
        subject: What is measured.
        optimizer: The live optimizer.
        beta: Rate of plain SGD, instead.
        options: How to measure.
        memory: What is known of the network.
    """

    def __init__(
        self, subject: Subject, optimizer: Optimizer | None, beta: float | None, options: Options, memory: Memory
    ) -> None:
        self.subject, self.optimizer, self.options, self.memory = subject, optimizer, options, memory
        self.maml = subject if isinstance(subject, MamlSubject) else None
        self.alpha = subject.alpha
        self.outer = outer_step(optimizer, subject.live)
        self.beta = scheduled_rate(optimizer) if optimizer is not None else math.nan if beta is None else float(beta)
        self.like = next(iter(subject.params.values())).new_empty(())
        self.blocks = subject.tasks if options.worst and self.maml is not None else None
        self.ranks = memory.ranks
        self.tasks = sum(self.ranks.gather(subject.tasks))
        self.alpha_note = ""
        self.notices: list[str] = []
        self._bill: list[tuple[Operator, Price]] = []
        self._other_products, self._other_cost = 0, 0.0

    @property
    def hvps(self) -> int:
        """Products used so far."""
        return sum(operator.matvecs for operator, _ in self._bill) + self._other_products

    @property
    def cost(self) -> float:
        """What was used so far, in training steps, by the prices of :mod:`~lightning_maml_guard.stability.budget`."""
        return sum(price.graph + price.product * each.matvecs for each, price in self._bill) + self._other_cost

    def charge(self, products: int, price: Price, graphs: int = 0) -> None:
        """Count what no operator of its own counts.

        Args:
            products: Products used.
            price: What each costs.
            graphs: Graphs built for them.
        """
        self._other_products += products
        self._other_cost += products * price.product + graphs * price.graph

    def operator(self, name: str, target: Target) -> tuple[Operator, float]:
        """Build an operator whose products count.

        Args:
            name: What it is called in messages.
            target: The gradient field, and where.

        Returns:
            The operator, and the relative error of its products.
        """
        gradient, params, layout = target
        price = UPDATE if self.maml is None or name == META_UPDATE else CURVATURE
        if not self.memory.knows(name):
            self.charge(0, price, graphs=SELF_CHECK)
        operator, noise = make_operator(name, gradient, params, layout, self.memory)
        self._bill.append((operator, price))
        return operator, noise

    def over_blocks(self, compute: Callable[[], T], blocks: int | None, choose: Callable[[list[T]], T]) -> T:
        """Compute something of an operator: of a block-diagonal one each rank has its own tasks' blocks.

        Args:
            compute: Makes this rank's.
            blocks: Number of blocks; None for a single matrix, which all ranks share.
            choose: Makes one of all ranks'.

        Returns:
            What holds for all ranks.

        Raises:
            NonFiniteProductError: If a product is not finite on one of them.
            ChangingOperatorError: If products do not belong to one matrix on one of them.
        """
        if blocks is None or self.ranks.size == 1:
            return compute()
        own: T | ArithmeticError
        before = self.hvps
        try:
            own = compute()
        except (NonFiniteProductError, ChangingOperatorError) as error:
            own = error
        used = self.hvps - before
        gathered = self.ranks.gather((own, used))
        # Their runs differ in length. What is counted decides when to check next, so it is the longest on all.
        self.charge(max(length for _, length in gathered) - used, CURVATURE)
        found = [each for each, _ in gathered]
        for each in found:
            if isinstance(each, ArithmeticError):
                raise each
        return choose(found)  # type: ignore[arg-type]
