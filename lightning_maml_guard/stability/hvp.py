"""Matrix-vector products with a Jacobian: by double backward where it is right, else by finite differences; counted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_maml_guard.linalg.lanczos import NonFiniteProductError, start_vector
from lightning_maml_guard.linalg.layout import WHOLE, Layout, Params
from lightning_maml_guard.linalg.operators import Field, FiniteDifference, Jacobian, Operator
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.messages.reasons import Kind, Reason
from lightning_maml_guard.stability.krylov_stopping import ChangingOperatorError, rounding
from lightning_maml_guard.stability.objective import MamlObjective, Objective, Target
from lightning_maml_guard.stability.problems import PlainProblem, Problem, first_batch
from lightning_maml_guard.utils.checks import first_line
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.random_state import seed_generators
from lightning_maml_guard.utils.task_map import TaskMap

T = TypeVar("T")

# What the operators are called, in messages too.
HESSIAN, META_UPDATE = "Hessian", "meta-update"
# The self-check compares a product with finite differences at these step sizes. They may differ by the differences'
# scatter and by a share of the product's size.
_STEP_SIZES = (1.0, 1 / 16, 1 / 256)
# Gradients that the self-check takes: two for each step size.
_SELF_CHECK = 2 * len(_STEP_SIZES)
_ALLOWED_MISMATCH = {torch.float32: 2e-2, torch.float64: 1e-4}


class Price(NamedTuple):
    """What an operator costs, in training steps: its graph once, and each matrix-vector product with it."""

    graph: float
    product: float


# So that the same run checks at the same steps on any machine: the upper end of what `python -m benchmarks.hvp_cost`
# measures of the Jacobian of the update that trains (MAML's or plain training's), and of the task loss's Hessian.
UPDATE_PRICE, HESSIAN_PRICE = Price(1.2, 2.1), Price(0.5, 0.75)


@dataclass
class NetworkFacts:
    """What measurements found out about a network, which stays true from one check to the next.

    Attributes:
        checked: Operators whose products were compared with finite differences.
        finite: Operators whose products are taken by finite differences, with the reason.
        looped: Whether vmap over the tasks fails.
    """

    checked: set[str] = field(default_factory=set)
    finite: dict[str, Reason] = field(default_factory=dict)
    looped: bool = False


# What measurements without a cache found out, by network.
_FACTS_BY_NETWORK: WeakKeyDictionary[nn.Module, dict[Any, NetworkFacts]] = WeakKeyDictionary()


def facts_of(problem: MetaProblem | PlainProblem, modules: Sequence[nn.Module]) -> NetworkFacts:
    """Return what is known in this process about a problem's kind on these modules; of none, nothing is."""
    if not modules:
        return NetworkFacts()
    function = problem.task_loss if isinstance(problem, MetaProblem) else problem.loss
    like = next(iter(problem.params.values()))
    settings = ("order", "inner_steps", "inner_update", "per_step", "looped", "task_chunk_size")
    kind = (
        getattr(getattr(function, "__func__", function), "__code__", type(function)),
        tuple(str(getattr(problem, name, None)) for name in settings),
        *(str(like.dtype), like.device.type),
        # Layers that are put in later, or switched to evaluation, are others.
        tuple((type(part), part.training) for module in modules for part in module.modules()),
    )
    return _FACTS_BY_NETWORK.setdefault(modules[0], {}).setdefault(kind, NetworkFacts())


@dataclass
class MeasurementCache:
    """What measurements of the same network share; pass one object to every :func:`measure` of a loop.

    Attributes:
        facts: What was found out about the network.
        ranks: The processes that measure together.
        task_map: How its tasks are run over; None before the first measurement.
        asked_to_loop: Whether that is one after another because the problem says so.
        checks: Whether products may be compared with finite differences: not after a divergence, nor if the inner loop
            diverges.
    """

    facts: NetworkFacts = field(default_factory=NetworkFacts)
    ranks: Ranks = field(default_factory=Ranks)
    task_map: TaskMap | None = None
    asked_to_loop: bool = False
    checks: bool = True

    def map_for(self, chunk_size: int | None, looped: bool = False) -> TaskMap:
        """Return the way to run over tasks: ``chunk_size`` vmapped at once (None: all), or one after another."""
        self.remember_looping()
        if self.task_map is None or self.task_map.chunk_size != chunk_size or self.asked_to_loop != looped:
            self.task_map, self.asked_to_loop = TaskMap(chunk_size, looped=looped or self.facts.looped), looped
        return self.task_map

    def map_of(self, problem: Problem) -> TaskMap:
        """Return the way to run over a problem's tasks."""
        one = first_batch(problem)
        return self.map_for(getattr(one, "task_chunk_size", None), getattr(one, "looped", False))

    def remember_looping(self) -> None:
        """Remember that vmap failed, unless the map loops because it was asked to."""
        if self.task_map is not None and self.task_map.looped and not self.asked_to_loop:
            self.facts.looped = True


class Operators:
    """The operators of one measurement, and what their products cost."""

    def __init__(self, objective: Objective, cache: MeasurementCache, *, per_task: bool) -> None:
        self.objective, self.cache, self.ranks = objective, cache, cache.ranks
        # Number of blocks of the Hessian, one per task; None for a single matrix.
        self.blocks = objective.tasks if per_task else None
        self._built: list[tuple[Operator, Price]] = []
        self._other_products, self._other_cost = 0, 0.0

    @property
    def hvps(self) -> int:
        """Products used so far."""
        return sum(operator.matvecs for operator, _ in self._built) + self._other_products

    @property
    def cost(self) -> float:
        """What was used so far, in training steps."""
        return sum(price.graph + price.product * each.matvecs for each, price in self._built) + self._other_cost

    @property
    def hessian_price(self) -> Price:
        """The Hessian's price: in plain training it is the Jacobian of the update."""
        return HESSIAN_PRICE if isinstance(self.objective, MamlObjective) else UPDATE_PRICE

    def charge(self, products: int, price: Price, graphs: int = 0) -> None:
        """Count what no operator counts itself."""
        self._other_products += products
        self._other_cost += products * price.product + graphs * price.graph

    def by_task(self, direction: Tensor) -> Tensor:
        """Measure each task's curvature of the update along a direction with a graph of its own."""
        assert isinstance(self.objective, MamlObjective)
        self.charge(1, UPDATE_PRICE, graphs=1)
        return self.objective.curvature_by_task(Layout(self.objective.params, self.objective.space).split(direction))

    def build(self, name: str, target: Target) -> tuple[Operator, float]:
        """Build an operator whose products count; returns it with the relative error of its products."""
        price = UPDATE_PRICE if name == META_UPDATE else self.hessian_price
        facts = self.cache.facts
        if target.space is WHOLE and name not in facts.checked and name not in facts.finite:
            self.charge(0, price, graphs=_SELF_CHECK)
        operator, noise = make_operator(name, target, self.cache)
        self._built.append((operator, price))
        return operator, noise

    def gradient(self, target: Target) -> Operator:
        """Evaluate a field where no product with its Jacobian is needed; it counts as a graph of the update's."""
        operator = FiniteDifference(target.field, target.params, target.block, space=target.space, error=target.error)
        operator.across(self.ranks)
        self.charge(0, UPDATE_PRICE, graphs=1)
        return operator

    def over_blocks(self, compute: Callable[[], T], blocks: int | None, choose: Callable[[list[T]], T]) -> T:
        """Compute something of an operator on every rank, and choose one result for all.

        Of a block-diagonal operator each rank has its own tasks' blocks; a single matrix (``blocks`` None) is shared.
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
        # Ranks' runs differ in length. The count decides when to check next, so all ranks count the longest.
        self.charge(max(length for _, length in gathered) - used, HESSIAN_PRICE)
        found = [each for each, _ in gathered]
        for each in found:
            if isinstance(each, ArithmeticError):
                raise each
        return choose(found)  # type: ignore[arg-type]


def make_operator(name: str, target: Target, cache: MeasurementCache) -> tuple[Operator, float]:
    """Build the operator of a gradient field; returns it with the relative error of its products.

    In the first measurement one product is compared with finite differences: some layers' second derivatives are
    silently wrong. Raises torch.OutOfMemoryError if there is no room for the graph.
    """
    gradient, params, layout = target.field, target.params, target.block
    like = next(iter(params.values()))
    facts = cache.facts
    operator: Operator | None = None
    if target.space is not WHOLE:  # a sharded module has no double backward
        operator = FiniteDifference(gradient, params, layout, space=target.space, error=target.error)
        return operator, _difference_noise(operator.error)
    trouble = None
    if name not in facts.finite:
        seed_generators()  # that the finite differences draw, too
        checked = name in facts.checked or not cache.checks
        operator, trouble = _double_backward(name, gradient, params, layout, checked=checked)
        if cache.checks:
            facts.checked.add(name)
    # What fails on one rank is done by finite differences on all, because their products are averaged.
    found = [each for each in cache.ranks.gather(trouble) if each is not None]
    if found:
        facts.finite[name] = found[0]
    if operator is None or found:
        operator = FiniteDifference(gradient, params, layout)  # raises what the loss itself raises
    if layout is None:
        operator.across(cache.ranks)
    return operator, rounding(like) if isinstance(operator, Jacobian) else _difference_noise(operator.error)


def _double_backward(
    name: str, gradient: Field, params: Params, layout: Layout | None, *, checked: bool
) -> tuple[Jacobian | None, Reason | None]:
    """The operator by double backward, and what is wrong with it."""
    try:
        operator = Jacobian(gradient, params, layout)
        if checked:
            return operator, None
        probe = _probe(operator, next(iter(params.values())))
        product = operator(probe)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        FiniteDifference(gradient, params, layout)  # raises what the loss itself raises
        return None, Reason(Kind.NO_DOUBLE_BACKWARD, what=name, detail=first_line(error))
    if not bool(torch.isfinite(product).all()):
        return operator, None  # the estimator names it
    mismatch = _mismatch(gradient, params, layout, probe, product)
    return operator, None if mismatch is None else Reason(Kind.WRONG_DOUBLE_BACKWARD, what=name, value=mismatch)


def _probe(operator: Jacobian, like: Tensor) -> Tensor:
    """Unit vector(s) along the gradient, where curvature is strong, and along all parameters."""
    gradient = operator.gradient
    noise = start_vector(gradient.shape, like)
    norms = [torch.linalg.vector_norm(each, dim=-1, keepdim=True) for each in (gradient, noise)]
    usable = torch.isfinite(norms[0]) & (norms[0] > 0)
    probe = torch.where(usable, gradient / norms[0], torch.zeros_like(gradient)) + noise / norms[1]
    return probe / torch.linalg.vector_norm(probe, dim=-1, keepdim=True)


def _mismatch(gradient: Field, params: Params, layout: Layout | None, probe: Tensor, product: Tensor) -> float | None:
    """Relative distance of ``v.Jv`` from finite differences, if it is more than they can explain."""
    # The scatter over three step sizes is what kinks (ReLU, max-pool) and rounding do to the differences; a double
    # backward that is wrong is off by more. `v.Jv` is the same for J and its transpose.
    difference = FiniteDifference(gradient, params, layout)
    differences = [difference.product(probe, step_size) for step_size in _STEP_SIZES]
    values = torch.stack([(probe * each).sum(-1) for each in differences])
    sizes = torch.stack([torch.linalg.vector_norm(each, dim=-1) for each in (product, differences[0])]).amax(0)
    gap = ((probe * product).sum(-1) - values.median(0).values).abs()
    scatter = values.amax(0) - values.amin(0)
    if not bool((gap > _ALLOWED_MISMATCH.get(product.dtype, 5e-2) * sizes + 2 * scatter).any()):
        return None
    return float((gap / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).max())


def _difference_noise(error: float) -> float:
    """Relative error of a central difference with the step balanced: of the order of ``error^(2/3)``."""
    return float(40 * error ** (2 / 3))
