"""Sets suggested rates in a module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.maml.meta_learning import MetaLearning

if TYPE_CHECKING:
    from lightning_maml_guard.tuner.suggestion import RateSuggestion

_ALPHA_NAMES, _BETA_NAMES = ("inner_lr", "alpha"), ("lr", "learning_rate")


def apply_rates(found: RateSuggestion, module: Any, alpha: str | None = None, beta: str | None = None) -> None:
    """Set a suggestion's rates in a module; see :meth:`RateSuggestion.apply`."""
    if math.isnan(found.beta):
        raise ValueError(f"There is nothing to apply: no rates are suggested. {' '.join(found.notices)}")
    ours = isinstance(module, MetaLearning)
    makes_optimizer = ours and type(module).configure_optimizers is MetaLearning.configure_optimizers
    if makes_optimizer and beta is None and found.setting != "lr":
        raise ValueError(
            f"The schedule of {type(module).__name__} sets the rate by its `{found.setting}`: pass "
            f"{found.setting}={found.beta:.3g} to it; apply can set the optimizer's lr alone."
        )
    # All places before the first is written: a failure leaves the module as it was.
    places = [] if makes_optimizer and beta is None else [(_place(module, beta, _BETA_NAMES, "beta"), found.beta)]
    if not math.isnan(found.alpha) and not (ours and alpha is None):
        places.append((_place(module, alpha, _ALPHA_NAMES, "alpha"), found.alpha))
    if not math.isnan(found.alpha) and ours and alpha is None:
        _set_inner_rates(module, found.alpha)
    if makes_optimizer and beta is None:
        module.outer_lr = found.beta
    for name, rate in places:
        if hasattr(module, name):
            setattr(module, name, rate)
        if name in getattr(module, "hparams", {}):
            module.hparams[name] = rate


def _set_inner_rates(module: MetaLearning, alpha: float) -> None:
    present = module.inner_lr
    learned = module.inner_rates.learned
    if learned is not None:
        highest = max(float(rate.detach().max()) for rate in learned)
        for rate in learned:
            rate.data.mul_(alpha / highest) if highest > 0 else rate.data.fill_(alpha)
    if isinstance(present, list):
        highest = max(present)
        module.inner_lr = [alpha * each / highest if highest > 0 else alpha for each in present]
    else:
        module.inner_lr = alpha
    if "inner_lr" in module.hparams:
        module.hparams["inner_lr"] = module.inner_lr


def _place(module: Any, given: str | None, names: tuple[str, ...], rate: str) -> str:
    """Find the name under which a module keeps a rate."""
    asked = names if given is None else (given,)
    for name in asked:
        if hasattr(module, name) or name in getattr(module, "hparams", {}):
            return name
    raise ValueError(
        f"Expected {type(module).__name__} or its hparams to hold {' or '.join(map(repr, asked))} but neither does, so "
        f"the suggested {rate} cannot be set. Name the attribute that it is read from, as in "
        f"apply(module, {rate}={asked[0]!r}), or set it by hand."
    )
