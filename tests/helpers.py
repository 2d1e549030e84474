"""Independent truths the tests compare with: dense Hessians, plain loops, bisection."""

from __future__ import annotations

import csv
import random
import re
import resource
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import fields

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_maml_guard import CurvatureOptions, EpisodeBatch, GuardWarning, LookaheadOptions, MetaLearningModule
from lightning_maml_guard.utils.lightning_compat import Trainer


def bisect(converges: Callable[[float], bool], low: float, high: float, relative: float = 1e-4) -> float:
    """Largest rate that converges; geometric bisection between one that does and one that does not."""
    assert converges(low), f"{low} should converge"
    assert not converges(high), f"{high} should diverge"
    while high / low > 1 + relative:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if converges(middle) else (low, middle)
    return (low * high) ** 0.5


def dense_hessian(loss: Callable[[dict], torch.Tensor], params: dict[str, torch.Tensor]) -> np.ndarray:
    """Hessian row by row, by torch.autograd.functional on one flat vector: none of our operators."""
    shapes = {name: value.shape for name, value in params.items()}

    def flat_loss(vector: torch.Tensor) -> torch.Tensor:
        pieces = vector.split([shape.numel() for shape in shapes.values()])
        return loss({n: p.reshape(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)})

    vector = torch.cat([value.detach().flatten() for value in params.values()])
    return torch.autograd.functional.hessian(flat_loss, vector).numpy()


def dense_by_differences(
    gradient: Callable[[torch.Tensor], torch.Tensor], centre: torch.Tensor, h: float = 1e-5
) -> np.ndarray:
    """Jacobian of a gradient, column by column, by central differences."""
    steps = h * torch.eye(len(centre), dtype=centre.dtype)
    return torch.stack([(gradient(centre + s) - gradient(centre - s)) / (2 * h) for s in steps], 1).numpy()


def symmetric_top(matrix: np.ndarray) -> float:
    """Largest eigenvalue of the symmetric part, which differences leave asymmetric by rounding."""
    return float(np.linalg.eigvalsh((matrix + matrix.T) / 2)[-1])


def support_loss(module: MetaLearningModule, batch: EpisodeBatch) -> Callable[[dict], torch.Tensor]:
    """Mean support loss over the tasks, in a plain loop."""
    xs, ys = batch.support
    return lambda params: (
        sum(module.loss(functional_call(module.network, params, (x,)), y) for x, y in zip(xs, ys, strict=True))
        / len(xs)
    )


def quadratic_batch(eigenvalues: list[float], target: float = 0.0) -> EpisodeBatch:
    """One task whose mean squared error over a linear model has exactly these Hessian eigenvalues."""
    n = len(eigenvalues)
    rotation = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))[0]
    x = (torch.diag((torch.tensor(eigenvalues, dtype=torch.float64) * n / 2).sqrt()) @ rotation).unsqueeze(0)
    y = torch.full((1, n, 1), target, dtype=torch.float64)
    return EpisodeBatch((x, y), (x, y))


def linear_module(n: int, beta: float, **arguments) -> MetaLearningModule:
    network = nn.Linear(n, 1, bias=False).double()
    nn.init.ones_(network.weight)
    return MetaLearningModule(network, optimizer=lambda p: SGD(p, lr=beta), **arguments)


QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def fit(module, batch, steps: int, callbacks=(), **arguments) -> Trainer:
    """Train on one and the same batch, quietly."""
    options = {"max_steps": steps, "max_epochs": -1, **QUIET}
    trainer = Trainer(**{**options, **arguments}, callbacks=list(callbacks))
    trainer.fit(module, DataLoader([batch] * max(steps, 1), batch_size=None))
    return trainer


def written(trainer) -> list[dict]:
    """The CSV log as text, without the guard's columns and the rows that held nothing else."""
    with open(f"{trainer.log_dir}/metrics.csv") as file:
        rows = [{n: v for n, v in row.items() if not n.startswith("guard/") and v} for row in csv.DictReader(file)]
    return [row for row in rows if set(row) - {"step"}]


def left_behind(module, trainer) -> dict:
    """Everything a run leaves, as bytes and primitives."""

    def exact(value):
        if isinstance(value, torch.Tensor):
            return str(value.dtype), value.detach().contiguous().reshape(-1).view(torch.uint8).tolist()
        if isinstance(value, dict):
            return {key: exact(each) for key, each in value.items()}
        return [exact(each) for each in value] if isinstance(value, (list, tuple)) else value

    schedulers = [{**c.scheduler.state_dict(), "lr_lambdas": None} for c in trainer.lr_scheduler_configs]
    for state in schedulers:
        state.pop("_anneal_func_type", None)
    return {
        "weights and buffers": exact(module.state_dict()),
        "optimizer": exact([each.state_dict() for each in trainer.optimizers]),
        "schedulers": exact(schedulers),
        "python": random.getstate(),
        "numpy": str(np.random.get_state(legacy=False)),
        "torch": exact(torch.get_rng_state()),
        "log": written(trainer),
    }


def leave_group() -> None:
    """With torch 2.6 gloo waits for its threads with the GIL held, which one that frees a tensor needs (#154976)."""
    dist.barrier()
    dist.destroy_process_group()


def one_line(message) -> str:
    """A warning's text without the wrapping that makes it a block."""
    return " ".join(str(message).split())


@contextmanager
def guard_warns(pattern: str):
    """``pytest.warns(GuardWarning, match=...)`` on the text without its wrapping."""
    with pytest.warns(GuardWarning) as caught:
        yield caught
    said = [one_line(each.message) for each in caught if each.category is GuardWarning]
    assert any(re.search(pattern, text) for text in said), f"{pattern!r} matches none of {said}"


def is_free_of_hooks(trainer) -> bool:
    return not any(o._optimizer_step_pre_hooks or o._optimizer_step_post_hooks for o in trainer.optimizers)


_CURVATURE = {field.name for field in fields(CurvatureOptions)}
_LOOKAHEAD = {field.name for field in fields(LookaheadOptions)}


def grouped(**flat):
    """A guard's arguments from a flat list: options of the curvature and of the lookahead go where they belong."""
    curvature = {name: flat.pop(name) for name in sorted(_CURVATURE & set(flat))}
    lookahead = {name: flat.pop(name) for name in sorted(_LOOKAHEAD & set(flat))}
    if curvature:
        flat["curvature"] = CurvatureOptions(**curvature)
    if lookahead:
        flat["lookahead"] = LookaheadOptions(**lookahead)
    return flat


def grouped_measure(**flat):
    """The same for ``measure``, by the simplified criterion unless told otherwise."""
    return grouped(**{"criterion": "simplified", **flat})


def grouped_suggest(**flat):
    """The same for ``suggest_rates``, whose curvature is that of the worst task unless told otherwise."""
    return grouped(**({"tasks": "worst", **flat} if _CURVATURE & set(flat) else flat))


@contextmanager
def full_disk(room: int = 2000):
    """No file can grow beyond this many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
