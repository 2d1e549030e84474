"""Call a network with given parameters, without touching its own state."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_maml_guard.maml.inner_loop import Params
from lightning_maml_guard.utils.double_backward import BatchStatistics, NativeRecurrence
from lightning_maml_guard.utils.lightning_compat import overrides

NOTHING_TO_TRAIN = (
    "The network has no parameter to train: it has none at all, or all of them are frozen (requires_grad=False). "
    "Unfreeze at least one."
)


class StatelessCall:
    """Calls a network; batch norm uses the batch's statistics, and the network's buffers stay as they are."""

    def __init__(self, network: nn.Module) -> None:
        # Looked up once: walking over the modules takes a notable share of a small network's step.
        self._has_buffers = next(network.buffers(), None) is not None
        norms = [part for part in network.modules() if isinstance(part, _BatchNorm)]
        self._has_norms, self._norms_track = bool(norms), any(norm.track_running_stats for norm in norms)
        self._is_recurrent = any(isinstance(part, nn.RNNBase) for part in network.modules())

    def __call__(self, network: nn.Module, params: Params, x: Tensor) -> Tensor:
        buffers = {name: value.clone() for name, value in network.named_buffers()} if self._has_buffers else {}
        stateless = self._norms_track or (self._has_norms and torch.is_autocast_enabled(x.device.type))
        recurrent = self._is_recurrent and x.is_cuda
        with BatchStatistics() if stateless else nullcontext(), NativeRecurrence() if recurrent else nullcontext():
            return torch.func.functional_call(network, {**params, **buffers}, (x,))


def trainable(network: nn.Module) -> Params:
    """Return the live parameters that train, by name."""
    return {name: value for name, value in network.named_parameters() if value.requires_grad}


def check_network(network: nn.Module, owner: Any = None) -> None:
    """Raise if this is no network, if nothing in it trains, or if its parameters hold no values.

    They may be empty, on the meta device, where ``owner``, its LightningModule, has a ``configure_model`` of its own.
    """
    if not isinstance(network, nn.Module):
        raise TypeError(
            f"Expected argument `network` to be a torch.nn.Module but got {type(network).__name__}. Pass an "
            "instance, such as mlp()."
        )
    if not trainable(network):
        raise ValueError(NOTHING_TO_TRAIN)
    made_later = owner is not None and overrides(owner, "configure_model")
    empty = [] if made_later else [name for name, value in network.named_parameters() if value.is_meta]
    if empty:
        raise ValueError(
            f"Expected argument `network` to hold values but got parameters on the meta device: {empty}. Build it "
            "on the CPU, or use network.to_empty(device='cpu') and initialise it."
        )
