"""How a run is spread over processes, and which spreads the guard can measure."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lightning_maml_guard.utils.distributed import ProcessGroup, Ranks
from lightning_maml_guard.utils.lightning_compat import MisconfigurationException

# By name, so that both Lightning packages' classes, and those derived from them, are known.
_TESTED = frozenset({"SingleDeviceStrategy", "DDPStrategy"})


def check_strategy(trainer: Any, allow_untested: bool) -> None:
    """Refuse a strategy under which measurements were not tested.

    Args:
        trainer: The Trainer.
        allow_untested: Whether to go on all the same.

    Raises:
        MisconfigurationException: If the strategy is not one that keeps whole parameters on every process.
    """
    strategy = type(trainer.strategy)
    if allow_untested or any(base.__name__ in _TESTED for base in strategy.__mro__):
        return
    raise MisconfigurationException(
        f"ConvergenceGuard was not tested with {strategy.__name__}: it needs the whole parameters on every process, "
        "and second derivatives through gathered pieces fail or are wrong. Use strategy='ddp' or one device, or pass "
        "ConvergenceGuard(allow_untested=True): a check that fails is then one warning, and training goes on."
    )


def ranks_of(trainer: Any) -> Ranks:
    """Find the processes that train together.

    Args:
        trainer: The Trainer.

    Returns:
        The ranks.
    """
    if trainer.world_size > 1 and dist.is_available() and dist.is_initialized():
        return ProcessGroup(trainer.strategy.root_device)
    return Ranks()
