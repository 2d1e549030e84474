"""The methods: each takes one meta-training step on the same batch with the same gradient and outer optimizer."""

from __future__ import annotations

import copy
import importlib.util
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import SGD, Adam, Optimizer

from benchmarks.meta_step.rows import LayerByLayer, Row
from lightning_maml_guard import MetaLearningModule
from lightning_maml_guard.maml.compiled import CompiledMetaGradient
from lightning_maml_guard.maml.meta_gradient import meta_gradient, nothing
from lightning_maml_guard.maml.vectorization import rule
from lightning_maml_guard.networks import Conv4
from lightning_maml_guard.utils.task_map import task_map

Step = Callable[[], object]
# (row, network, support, query, outer optimizer or None for the method's default) -> one step
Make = Callable[[Row, nn.Module, Any, Any, Callable[..., Optimizer] | None], Step]


def _users(network: nn.Module) -> nn.Module:
    return LayerByLayer(network) if isinstance(network, Conv4) else network


def _adam(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=1e-3)


def hand_written(row: Row, network: nn.Module, support: Any, query: Any, optimizer: Any, ours: bool = False) -> Step:
    network = network if ours else _users(network)
    outer = (optimizer or _adam)(network.parameters())
    params = dict(network.named_parameters())

    def step() -> None:
        outer.zero_grad()
        for index in range(row.tasks):
            fast = params
            for _ in range(row.inner_steps):
                loss = row.loss(functional_call(network, fast, (support[0][index],)), support[1][index])
                gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=True)
                fast = {n: v - row.alpha * g for (n, v), g in zip(fast.items(), gradients, strict=True)}
            (row.loss(functional_call(network, fast, (query[0][index],)), query[1][index]) / row.tasks).backward()
        outer.step()

    return step


def ours(strategy: str | int, compiled: bool = False, batched: bool = True) -> Make:
    def make(row: Row, network: nn.Module, support: Any, query: Any, optimizer: Any) -> Step:
        module = MetaLearningModule(
            network,
            inner_lr=row.alpha,
            inner_steps=row.inner_steps,
            optimizer=optimizer,
            vectorize=strategy,
            batched=batched,
        )
        module._first_batch.passed = True  # as after a fit's first step, which alone looks at the labels
        outer = module.configure_optimizers()
        parameters = list(module.theta().values())
        compute = CompiledMetaGradient() if compiled else meta_gradient
        tasks = task_map(rule(network, parameters[0].device) if strategy == "auto" else strategy)

        def step() -> None:
            problem = module.meta_problem((support, query))
            found = compute(problem, tasks=tasks, learn_rates=False, auxiliary=nothing).gradients
            for parameter, gradient in zip(parameters, found.values(), strict=True):
                parameter.grad = gradient
            outer.step()

        return step

    return make


def torchopt_vmap(row: Row, network: nn.Module, support: Any, query: Any, optimizer: Any) -> Step:
    import torchopt

    network = _users(network)
    outer = (optimizer or _adam)(network.parameters())
    params = dict(network.named_parameters())
    inner = torchopt.sgd(row.alpha)

    def task(theta: Any, sx: Tensor, sy: Tensor, qx: Tensor, qy: Tensor) -> Tensor:
        state, fast = inner.init(theta), theta
        for _ in range(row.inner_steps):
            gradients = torch.func.grad(lambda p: row.loss(functional_call(network, p, (sx,)), sy))(fast)
            updates, state = inner.update(gradients, state, inplace=False)
            fast = torchopt.apply_updates(fast, updates, inplace=False)
        return row.loss(functional_call(network, fast, (qx,)), qy)

    def step() -> None:
        outer.zero_grad()
        torch.func.vmap(task, (None, 0, 0, 0, 0))(params, *support, *query).mean().backward()
        outer.step()

    return step


def torchopt_metasgd(row: Row, network: nn.Module, support: Any, query: Any, optimizer: Any) -> Step:
    import torchopt

    network = _users(network)
    outer = (optimizer or _adam)(network.parameters())
    inner = torchopt.MetaSGD(network, lr=row.alpha)

    def step() -> None:
        outer.zero_grad()
        before, state = (
            torchopt.extract_state_dict(network, by="reference"),
            torchopt.extract_state_dict(inner, by="reference"),
        )
        for index in range(row.tasks):
            for _ in range(row.inner_steps):
                inner.step(row.loss(network(support[0][index]), support[1][index]))
            (row.loss(network(query[0][index]), query[1][index]) / row.tasks).backward()
            torchopt.recover_state_dict(network, before)
            torchopt.recover_state_dict(inner, state)
        outer.step()

    return step


def higher_loop(row: Row, network: nn.Module, support: Any, query: Any, optimizer: Any) -> Step:
    import higher

    network = _users(network)
    outer = (optimizer or _adam)(network.parameters())
    inner = SGD(network.parameters(), lr=row.alpha)

    def step() -> None:
        outer.zero_grad()
        for index in range(row.tasks):
            with higher.innerloop_ctx(network, inner, copy_initial_weights=False) as (fast, differentiable):
                for _ in range(row.inner_steps):
                    differentiable.step(row.loss(fast(support[0][index]), support[1][index]))
                (row.loss(fast(query[0][index]), query[1][index]) / row.tasks).backward()
        outer.step()

    return step


def iteryne_loop(row: Row, network: nn.Module, support: Any, query: Any, optimizer: Any) -> Step:
    from iteryne import MAML

    network = _users(network)
    maml = MAML(network, inner_lr=row.alpha, inner_steps=row.inner_steps, first_order=False)
    outer = (optimizer or _adam)(maml.parameters())

    def step() -> None:
        outer.zero_grad()
        for index in range(row.tasks):
            learner = maml.clone()
            for _ in range(row.inner_steps):
                learner.adapt(row.loss(learner(support[0][index]), support[1][index]))
            (row.loss(learner(query[0][index]), query[1][index]) / row.tasks).backward()
        outer.step()

    return step


def metalearn(backend: str) -> Make:
    def make(row: Row, network: nn.Module, support: Any, query: Any, optimizer: Any) -> Step:
        from metalearn.algorithms.MAML import MAML
        from metalearn.inner_optimizers.optimizers import InnerSGD
        from metalearn.loss.base import BaseLoss

        class Loss(BaseLoss):
            def forward(self, out_dict: Any, targets: Any, model_states: Any = None, **kwargs: Any) -> Any:
                loss = row.loss(out_dict["logits"], targets)
                return loss, loss.detach()

        class Model(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.backbone = _users(network)

            def forward(self, x: Tensor, **kwargs: Any) -> Any:
                return {"logits": self.backbone(x), "buffers": dict(self.named_buffers())}

            def get_fast_weights(self, **kwargs: Any) -> OrderedDict[str, Tensor]:
                return OrderedDict(self.named_parameters())

        model = Model()
        device = support[0].device
        inner = InnerSGD(model.get_fast_weights(), inner_lr=row.alpha, max_inner_steps=row.inner_steps, learn_lr=False)
        learner = MAML(
            model=model,
            optimizer=(optimizer or _adam)(model.parameters()),
            inner_optimizer=inner,
            support_loss_fn=Loss(),
            inner_steps=row.inner_steps,
            backend=backend,
            device=device,
        )

        def batches() -> Iterator[Any]:
            while True:
                yield support[0], support[1], query[0], query[1]

        stream = batches()
        return lambda: learner.step(stream, training=True, epoch=0, epochs=1)

    return make


PEERS: dict[str, Make] = {
    "torchopt, vmap": torchopt_vmap,
    "torchopt, MetaSGD": torchopt_metasgd,
    "higher": higher_loop,
    "iteryne": iteryne_loop,
    "parallel-metalearn, vmap": metalearn("vmap"),
    "parallel-metalearn, sequential": metalearn("sequential"),
}
if importlib.util.find_spec("jax") and importlib.util.find_spec("optax"):
    from benchmarks.meta_step.jax_method import jax_jit

    PEERS["JAX, jit and vmap"] = jax_jit
OURS: dict[str, Make] = {
    "ours, defaults": ours("auto"),
    "ours, loop": ours("loop"),
    "ours, 8 at once": ours(8),
    "ours, all at once": ours("all"),
    "ours, compile=True": ours("auto", compiled=True),
}
BASELINE = "hand-written loop"


def methods(compiled: bool) -> dict[str, Make]:
    """All methods by name, the baseline first."""
    loop_of_ours: Make = lambda *args: hand_written(*args, ours=True)  # noqa: E731
    ours_here = {name: make for name, make in OURS.items() if compiled or "compile" not in name}
    return {BASELINE: hand_written, "hand-written loop on our conv4": loop_of_ours, **PEERS, **ours_here}


def gradient_by(make: Make, row: Row, network: nn.Module, support: Any, query: Any) -> Tensor:
    """The meta-gradient that a method uses, read off one step of plain SGD with rate 1."""
    network = copy.deepcopy(network)
    before = nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    make(row, network, support, query, lambda parameters: SGD(parameters, lr=1.0))()
    return before - nn.utils.parameters_to_vector(network.parameters()).detach()
