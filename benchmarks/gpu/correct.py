"""The same on the CPU and on the GPU: measurements, meta-gradients, a guarded training."""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib.util import find_spec
from itertools import product
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.utils.data import DataLoader

from benchmarks.meta_step.rows import Transformer
from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, EpisodeBatch, MetaLearningModule, measure
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import conv4, mlp
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import Trainer

AGREES = 1e-4
NUMBERS = ("lambda_max", "alpha_c", "beta_c", "exact_beta_c", "beta_c_noise", "predicted_change")
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p, lr, cuda: SGD(p, lr=lr),
    "SGD, momentum .9": lambda p, lr, cuda: SGD(p, lr=lr, momentum=0.9),
    "SGD, fused": lambda p, lr, cuda: SGD(p, lr=lr, momentum=0.9, fused=True),
    "Adam": lambda p, lr, cuda: Adam(p, lr=lr),
    "Adam, capturable": lambda p, lr, cuda: Adam(p, lr=torch.tensor(lr, device=p[0].device), capturable=cuda),
    "Adam, fused": lambda p, lr, cuda: Adam(p, lr=lr, fused=True),
    "AdamW, capturable and foreach": lambda p, lr, cuda: AdamW(p, lr=lr, capturable=cuda, foreach=cuda),
    "NAdam": lambda p, lr, cuda: NAdam(p, lr=lr),
    "RMSprop": lambda p, lr, cuda: RMSprop(p, lr=lr),
    "Adagrad": lambda p, lr, cuda: Adagrad(p, lr=lr),
}


class Recurrent(nn.Module):
    """A task's points as one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.memory, self.read = nn.LSTM(1, 8), nn.Linear(8, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.read(self.memory(x)[0])


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (lambda: mlp(1, (16, 16)), (1,), 0),
    "transformer": (lambda: Transformer(width=8, heads=2, depth=1), (1,), 0),
    "conv4": (lambda: conv4(filters=4, image_size=28), (1, 28, 28), 3),
    "lstm": (Recurrent, (1,), 0),
}


def batch(example: tuple[int, ...], way: int, device: torch.device, tasks: int = 3) -> EpisodeBatch:
    """Draw float64 tasks on the CPU and move them."""
    generator = torch.Generator().manual_seed(5)
    sets = []
    for _ in range(2):
        x = torch.randn(tasks, 6, *example, generator=generator, dtype=torch.float64)
        y = torch.arange(6).remainder(way).expand(tasks, 6) if way else torch.sin(3 * x)
        sets.append((x.to(device), y.contiguous().to(device)))
    return EpisodeBatch(*sets)


def module(name: str, device: torch.device, **options: Any) -> tuple[MetaLearningModule, EpisodeBatch]:
    """Make a module in float64, the same on every device, and its batch."""
    make, example, way = NETWORKS[name]
    torch.manual_seed(0)
    network = make().double()
    return MetaLearningModule(network, inner_lr=0.02, **options).to(device), batch(example, way, device)


def gap(one: float, other: float) -> float:
    """Relative difference of two numbers; 0 where both are nan, or the same infinity."""
    if (math.isnan(one) and math.isnan(other)) or one == other:
        return 0.0
    return abs(one - other) / max(abs(one), abs(other))


def measured(
    device: torch.device, network: str, optimizer: str, order: str, criterion: str, **more: Any
) -> list[float]:
    """Take two steps and measure: the numbers of the report."""
    made, data = module(network, device, order=order)
    parameters = list(made.theta().values())
    outer = OPTIMIZERS[optimizer](parameters, 1e-3, device.type == "cuda")
    for _ in range(2):
        for parameter, gradient in zip(
            parameters, meta_gradient(made.meta_problem(data)).gradients.values(), strict=True
        ):
            parameter.grad = gradient
        outer.step()
    options = CurvatureOptions(criterion=criterion, max_iter=12, **more)
    report = measure(made.meta_problem(data), optimizer=outer, curvature=options)
    return [getattr(report, name) for name in NUMBERS]


def measurements(device: torch.device) -> list[dict[str, Any]]:
    """Largest gap of a report's numbers between the CPU and the device, by what is measured."""
    cases = [
        ("mlp", optimizer, "exact", criterion, {})
        for optimizer, criterion in product(OPTIMIZERS, ("exact", "simplified"))
    ]
    cases += [
        ("mlp", "SGD", order, criterion, {})
        for order, criterion in product(("first", "simplified"), ("exact", "simplified"))
    ]
    cases += [
        (network, "SGD", "exact", "exact", {"tasks": tasks})
        for network, tasks in product(("transformer", "conv4", "lstm"), ("mean", "worst"))
    ]
    if find_spec("pyhessian"):
        cases.append(("mlp", "SGD", "exact", "simplified", {"estimator": "pyhessian"}))
    rows = []
    for network, optimizer, order, criterion, more in cases:
        here, there = (
            measured(each, network, optimizer, order, criterion, **more) for each in (torch.device("cpu"), device)
        )
        worst = max(gap(one, other) for one, other in zip(here, there, strict=True))
        title = f"measure: {network}, {optimizer}, order {order}, criterion {criterion} {more or ''}".strip()
        rows.append({"what": title, "gap": worst, "agrees": worst <= AGREES})
    return rows + [_reduced(network, device) for network in ("transformer", "conv4")]


def _reduced(network: str, device: torch.device) -> dict[str, Any]:
    """A float32 measurement where products may be rounded to TF32 or bfloat16, beside one where they may not."""
    before, found = torch.get_float32_matmul_precision(), []
    for precision in ("highest", "medium"):
        made, data = module(network, device)
        made = made.float()
        support, query = ((x.float(), y if y.dtype == torch.int64 else y.float()) for x, y in data)
        torch.set_float32_matmul_precision(precision)
        report = measure(made.meta_problem((support, query)), optimizer=SGD(made.theta().values(), lr=1e-3))
        found.append([getattr(report, name) for name in NUMBERS])
        torch.set_float32_matmul_precision(before)
    worst = max(gap(one, other) for one, other in zip(*found, strict=True))
    return {
        "what": f"measure: {network}, float32 matmul precision medium and highest",
        "gap": worst,
        "agrees": worst <= AGREES,
    }


def gradients(device: torch.device) -> list[dict[str, Any]]:
    """Relative distance of the meta-gradients in float64."""
    rows = []
    for network, order in product(NETWORKS, ("exact", "first", "simplified")):
        found = []
        for each in (torch.device("cpu"), device):
            made, data = module(network, each, order=order, inner_steps=2)
            values = meta_gradient(made.meta_problem(data)).gradients.values()
            found.append(torch.cat([value.flatten().cpu() for value in values]))
        distance = float((found[0] - found[1]).norm() / found[0].norm())
        rows.append(
            {"what": f"meta-gradient: {network}, order {order}, K=2", "gap": distance, "agrees": distance <= AGREES}
        )
    return rows


def trained(device: torch.device, adam: bool) -> list[float]:
    """Train under a guard that rescales: its cap, statuses and the weights' norm."""
    torch.manual_seed(0)
    network = mlp(1, (16, 16)).double()
    capturable = {"capturable": device.type == "cuda"}
    factory = (lambda p: Adam(p, lr=3.0, **capturable)) if adam else (lambda p: SGD(p, lr=30.0))
    made = MetaLearningModule(network, inner_lr=0.02, optimizer=factory)
    family, guard = Sinusoid(5, 5), ConvergenceGuard(every_n_steps=4, action="rescale")
    batches = [family.sample(4, episode_generator(0, "train", step)) for step in range(12)]
    batches = [EpisodeBatch(*(tuple(x.double() for x in each) for each in one)) for one in batches]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, max_epochs=1, callbacks=[guard], **quiet
    )
    trainer.fit(made, DataLoader(batches, batch_size=None))
    norm = float(torch.cat([value.detach().flatten().cpu() for value in network.parameters()]).norm())
    return [guard.history[-1].beta_applied, guard.history[-1].lambda_max, guard.severities[-1][1], norm]


def trainings(device: torch.device) -> list[dict[str, Any]]:
    """Largest gap after 12 guarded steps, which rounding makes wider."""
    rows = []
    for adam in (False, True):
        here, there = trained(torch.device("cpu"), adam), trained(device, adam)
        worst = max(gap(one, other) for one, other in zip(here, there, strict=True))
        title = f"12 steps, action='rescale', {'Adam, capturable' if adam else 'SGD'}"
        rows.append({"what": title, "gap": worst, "agrees": worst <= AGREES})
    return rows
