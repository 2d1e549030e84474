"""Products with a Jacobian, by double backward where that works and by finite differences where it does not."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_maml_guard.linalg.lanczos import start_vector
from lightning_maml_guard.linalg.layout import Layout, Params
from lightning_maml_guard.linalg.operators import Field, FiniteDifference, Jacobian, Operator
from lightning_maml_guard.stability.krylov_stopping import rounding
from lightning_maml_guard.utils.checks import first_line
from lightning_maml_guard.utils.distributed import Ranks
from lightning_maml_guard.utils.task_map import TaskMap

# Step sizes of the self-check, and how far a product may be from it, relative to its size, beyond their scatter.
_STRETCHES = (1.0, 1 / 16, 1 / 256)
# Gradients that takes: two for each.
SELF_CHECK = 2 * len(_STRETCHES)
_AGREEMENT = {torch.float32: 2e-2, torch.float64: 1e-4}


@dataclass
class Memory:
    """What earlier measurements of the same network found out, so that it is asked once.

    Attributes:
        task_map: How its tasks are run over; None before the first measurement.
        asked_to_loop: Whether that is one after another because the problem says so.
        vmap_fails: Whether a map found out that it must loop.
        checked: Operators whose products were compared with finite differences.
        finite: Operators whose products are taken by finite differences, with the reason.
        ranks: The processes that measure together.
    """

    task_map: TaskMap | None = None
    asked_to_loop: bool = False
    vmap_fails: bool = False
    checked: set[str] = field(default_factory=set)
    finite: dict[str, str] = field(default_factory=dict)
    ranks: Ranks = field(default_factory=Ranks)

    def map_for(self, chunk_size: int | None, looped: bool = False) -> TaskMap:
        """Give the way to run over tasks, made anew when that changes.

        Args:
            chunk_size: Tasks vmapped at once (None: all).
            looped: Whether the problem asks for one task after another.

        Returns:
            The map, which remembers whether it must loop.
        """
        self._ask_the_map()
        if self.task_map is None or self.task_map.chunk_size != chunk_size or self.asked_to_loop != looped:
            self.task_map, self.asked_to_loop = TaskMap(chunk_size, looped=looped or self.vmap_fails), looped
        return self.task_map

    def knows(self, name: str) -> bool:
        """Say whether an operator's products have been compared with finite differences, or are such.

        Args:
            name: What it is called.

        Returns:
            Whether they have or are.
        """
        return name in self.checked or name in self.finite

    def state(self) -> dict[str, Any]:
        """Collect the state as primitives.

        Returns:
            What :meth:`load` takes.
        """
        self._ask_the_map()
        return {"checked": sorted(self.checked), "finite": dict(self.finite), "looped": self.vmap_fails}

    def _ask_the_map(self) -> None:
        # A map that found out that vmap fails goes on looping; one that was asked to loop need not.
        if self.task_map is not None and self.task_map.looped and not self.asked_to_loop:
            self.vmap_fails = True

    def load(self, state: dict[str, Any]) -> None:
        """Restore the state.

        Args:
            state: What :meth:`state` collected.
        """
        self.checked, self.finite = set(state.get("checked", [])), dict(state.get("finite", {}))
        self.task_map, self.asked_to_loop, self.vmap_fails = None, False, bool(state.get("looped"))


def make_operator(
    name: str, gradient: Field, params: Params, layout: Layout | None, memory: Memory
) -> tuple[Operator, float]:
    """Build the operator of a gradient field.

    On the first measurement one product is compared with finite differences: some layers' second derivatives are
    wrong without a word.

    Args:
        name: What the operator is called in messages.
        gradient: The gradient field.
        params: Where to differentiate.
        layout: Layout of one block, where there are several.
        memory: What is known of the network; written to.

    Returns:
        The operator, and the relative error of its products.

    Raises:
        RuntimeError: If there is no room for the graph (torch.OutOfMemoryError).
    """
    like = next(iter(params.values()))
    operator: Operator | None = None
    trouble = None
    if name not in memory.finite:
        torch.manual_seed(0)  # the masks that the finite differences draw, too
        operator, trouble = _double_backward(name, gradient, params, layout, checked=name in memory.checked)
        memory.checked.add(name)
    # What fails on one rank is done by finite differences on all: their products are averaged.
    found = [each for each in memory.ranks.gather(trouble) if each is not None]
    if found:
        memory.finite[name] = found[0]
    if operator is None or found:
        operator = FiniteDifference(gradient, params, layout)  # raises what the loss itself raises
    if layout is None:
        operator.across(memory.ranks)
    return operator, rounding(like) if isinstance(operator, Jacobian) else _finite_noise(like)


def _double_backward(
    name: str, gradient: Field, params: Params, layout: Layout | None, *, checked: bool
) -> tuple[Jacobian | None, str | None]:
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
        return None, (
            f"{name}: this network has no second derivative by double backward ({first_line(error)}), so its curvature "
            "is measured by finite differences of gradients (less sharp, two gradients a product)."
        )
    if not bool(torch.isfinite(product).all()):
        return operator, None  # the estimator names it
    mismatch = _mismatch(gradient, params, layout, probe, product)
    if mismatch is None:
        return operator, None
    return operator, (
        f"{name}: the second derivative by double backward disagrees with finite differences by {mismatch:.1%}: a "
        "layer's double backward is wrong (a custom autograd Function without one, a reentrant checkpoint). "
        "The curvature is measured by finite differences of gradients instead."
    )


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
    # backward that is wrong is off by more. `v.Jv` does not depend on which side of J the product is.
    difference = FiniteDifference(gradient, params, layout)
    differences = [difference.product(probe, stretch) for stretch in _STRETCHES]
    values = torch.stack([(probe * each).sum(-1) for each in differences])
    sizes = torch.stack([torch.linalg.vector_norm(each, dim=-1) for each in (product, differences[0])]).amax(0)
    gap = ((probe * product).sum(-1) - values.median(0).values).abs()
    scatter = values.amax(0) - values.amin(0)
    if not bool((gap > _AGREEMENT.get(product.dtype, 5e-2) * sizes + 2 * scatter).any()):
        return None
    return float((gap / sizes.clamp(min=torch.finfo(sizes.dtype).tiny)).max())


def _finite_noise(like: Tensor) -> float:
    """Relative error of a central difference with the step balanced: of the order of ``eps^(2/3)``."""
    return float(40 * torch.finfo(like.dtype).eps ** (2 / 3))
