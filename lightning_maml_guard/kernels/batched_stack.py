"""A stack of linear layers, activations and layer norms, run for several tasks at once with weights of their own.

A linear layer of all tasks is one batched matrix product, without ``vmap`` and ``functional_call``, which take half of
a small network's step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lightning_maml_guard.kernels import kernels_enabled

Params = dict[str, Tensor]

# Computed entry by entry and without parameters, so that a task dimension in front changes nothing.
_ELEMENTWISE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign),
    *(nn.Tanh, nn.Tanhshrink, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Identity),
)
_KNOWN = (nn.Sequential, nn.Linear, nn.LayerNorm, *_ELEMENTWISE)


class BatchedStack:
    """A network as its layers, if it is nested ``nn.Sequential`` of torch's own classes, without hooks."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._parts = list(network.modules())
        names = [len(list(network.named_parameters(remove_duplicate=again))) for again in (False, True)]
        # Tied weights have one name and several places.
        self._layers = list(_layers("", network)) if names[0] == names[1] and all(map(_is_plain, self._parts)) else []
        self.linear = {name: layer for name, layer in self._layers if isinstance(layer, nn.Linear)}
        # The names of their weights and biases.
        self.named = {name: tuple(f"{name}.{kind}".lstrip(".") for kind in ("weight", "bias")) for name in self.linear}
        # Whether examples may lie side by side, whichever task they are of.
        self.by_row = not any(isinstance(layer, nn.LayerNorm) for _, layer in self._layers)

    @property
    def entries(self) -> tuple[int, int]:
        """Entries of the linear layers' weights, and of one row of input and output of each."""
        sizes = [(layer.in_features, layer.out_features) for layer in self.linear.values()]
        return sum(fan_in * fan_out for fan_in, fan_out in sizes), sum(map(sum, sizes))

    @property
    def is_applicable(self) -> bool:
        """True if the network is a stack and still the one it was."""
        return (
            bool(self._layers)
            and kernels_enabled()
            and not any(_global_hooks())
            and all(map(_is_plain, self._parts))
            and self._parts == list(self._network.modules())
        )

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Predict for tasks in a leading dimension of ``x`` and of every parameter."""
        return self.run(params, x, lambda name, layer, x: _linear(x, *_weights(name, layer, params, len(x))))

    def run(self, params: Params, x: Tensor, linear: Callable[[str, nn.Linear, Tensor], Tensor]) -> Tensor:
        """Predict with this function in place of the linear layers."""
        for name, layer in self._layers:
            if isinstance(layer, nn.Linear):
                x = linear(name, layer, x)
            elif isinstance(layer, nn.LayerNorm):
                # Without weights torch's own is right at every order of differentiation.
                standard = F.layer_norm(x, layer.normalized_shape, eps=layer.eps)
                weight, bias = _weights(name, layer, params, len(x))
                shape = (len(x), *[1] * (x.dim() - 1 - len(layer.normalized_shape)), *layer.normalized_shape)
                x = standard if weight is None else standard * weight.reshape(shape)
                x = x if bias is None else x + bias.reshape(shape)
            else:
                x = layer(x)
        return x


def _global_hooks() -> tuple[object, ...]:
    # torch's own function for this came after 2.6.
    return (
        torch_module._global_forward_pre_hooks,
        torch_module._global_forward_hooks,
        torch_module._global_backward_pre_hooks,
        torch_module._global_backward_hooks,
    )


def _layers(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    if not isinstance(module, nn.Sequential):
        yield prefix, module
        return
    for name, child in module._modules.items():  # with a layer that stands in several places
        assert child is not None
        yield from _layers(f"{prefix}.{name}" if prefix else name, child)


def _is_plain(module: nn.Module) -> bool:
    hooks = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return type(module) in _KNOWN and not hooks and not module._buffers and not getattr(module, "inplace", False)


def _weights(name: str, layer: nn.Module, params: Params, tasks: int) -> tuple[Tensor | None, Tensor | None]:
    """The weight and bias of every task; those that are not among the parameters (frozen) are the layer's own."""
    found: list[Tensor | None] = []
    for kind in ("weight", "bias"):
        value = params.get(f"{name}.{kind}" if name else kind)
        own = getattr(layer, kind)
        found.append(value if value is not None or own is None else own.expand(tasks, *own.shape))
    return found[0], found[1]


def _linear(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    assert weight is not None
    rows = x if x.dim() == 3 else x.flatten(1, -2)
    turned = weight.transpose(1, 2)
    if rows.shape[-1] == 1:  # an outer product, which a matrix product takes three times as long for
        product = rows * turned if bias is None else rows * turned + bias.unsqueeze(1)
    else:
        product = torch.bmm(rows, turned) if bias is None else torch.baddbmm(bias.unsqueeze(1), rows, turned)
    return product if x.dim() == 3 else product.unflatten(1, x.shape[1:-1])
