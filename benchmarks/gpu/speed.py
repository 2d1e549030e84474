"""Times, waits and memory on one device: meta-steps, CUDA graphs, checks, phase diagrams."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch.optim import SGD, Adam

from benchmarks.meta_step.methods import BASELINE, OURS, hand_written
from benchmarks.meta_step.rows import ROWS, Row
from lightning_maml_guard import MetaLearningModule, MetaProblem, measure, phase_diagram
from lightning_maml_guard.cli.paper_panels import FULL, problems
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.phase.result import PhaseDiagram
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.regression import Sinusoid

Step = Callable[[], object]
_JAX = ("sinusoid", "omniglot", "mlp-640", "transformer", "miniimagenet", "omniglot-15q", "sinusoid-64", "omniglot-5")


def rows_for(device: torch.device) -> dict[str, Row]:
    """The rows of the meta-step; on a CPU two of them, and few tasks."""
    if device.type == "cuda":
        return ROWS
    return {name: replace(ROWS[name], tasks=2, burst=1) for name in ("sinusoid", "transformer")}


def wait(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(step: Step, device: torch.device, least: float = 0.2, most: int = 200) -> float:
    """Median time of a step, over turns of at least some time."""
    step()
    wait(device)
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < least and len(times) < most):
        at = time.perf_counter()
        step()
        wait(device)
        times.append(time.perf_counter() - at)
    return median(times)


def memory(step: Step, device: torch.device) -> float:
    """MiB that a step adds to what is allocated before it; nan on a CPU."""
    if device.type != "cuda":
        return float("nan")
    wait(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    wait(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def waits(step: Step, device: torch.device, given: Any) -> int:
    """How often a step makes the host wait for the device; on a CPU, how often it would."""
    if device.type != "cuda":
        from tests.host_syncs import HostSyncs

        with HostSyncs(given) as syncs:
            step()
        return syncs.count
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(each.message) for each in said)


def step_of(name: str, row: Row, device: torch.device, compiled: bool = False) -> Step:
    """Make a method's step on a row."""
    support, query = row.data(torch.float32, device)
    torch.manual_seed(0)
    make = hand_written if name == BASELINE else OURS["ours, compile=True" if compiled else name]
    return make(row, row.network().to(device), support, query, None)


def meta_steps(device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds and memory of a meta-step, ours and the hand-written loop's."""
    found = []
    for key, row in rows_for(device).items():
        steps = {name: step_of(name, row, device) for name in (BASELINE, "ours, defaults", "ours, 8 at once")}
        times = {name: seconds(step, device) for name, step in steps.items()}
        for name, step in steps.items():
            found.append(
                {
                    "row": key,
                    "method": name,
                    "ms": 1e3 * times[name],
                    "times the loop": times[BASELINE] / times[name],
                    "MiB": memory(step, device),
                }
            )
    return found


def compiled(device: torch.device) -> list[dict[str, Any]]:
    """The same with compile=True, and how long the compilation takes."""
    found = []
    for key in ("sinusoid", "transformer") if device.type == "cuda" else ("sinusoid",):
        row = rows_for(device)[key]
        began, step = time.perf_counter(), step_of("ours, defaults", row, device, compiled=True)
        step()
        wait(device)
        compiling = time.perf_counter() - began
        loop, eager, fast = (
            seconds(each, device)
            for each in (step_of(BASELINE, row, device), step_of("ours, defaults", row, device), step)
        )
        found.append(
            {
                "row": key,
                "compile s": compiling,
                "ms": 1e3 * fast,
                "times the loop": loop / fast,
                "times eager": eager / fast,
            }
        )
    return found


def graphs(device: torch.device) -> list[dict[str, Any]]:
    """A meta-step captured as a CUDA graph and replayed, capturable Adam included; its distance from an eager one."""
    names = ("sinusoid", "transformer", "omniglot") if device.type == "cuda" else ("sinusoid",)
    return [_graph(name, rows_for(device)[name], device) for name in names]


def _static_step(module: MetaLearningModule, support: Any, query: Any, capturable: bool) -> Step:
    """A meta-step that writes into the same tensors each time."""
    parameters = list(module.theta().values())
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    outer = Adam(parameters, lr=1e-3, capturable=capturable)

    def step() -> None:
        gradients = meta_gradient(module.meta_problem((support, query)), tasks=module.task_map).gradients
        for parameter, gradient in zip(parameters, gradients.values(), strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(gradient)
        outer.step()

    return step


def _graph(name: str, row: Row, device: torch.device) -> dict[str, Any]:
    support, query = row.data(torch.float32, device)
    torch.manual_seed(0)
    module = MetaLearningModule(row.network().to(device), row.loss, inner_lr=row.alpha, inner_steps=row.inner_steps)
    # As after a fit's first step, which alone looks at the labels: reading them waits, and a capture cannot.
    module._first_batch.passed = True
    twin = copy.deepcopy(module)
    captured, eager = (_static_step(each, support, query, device.type == "cuda") for each in (module, twin))
    if device.type != "cuda":
        captured()
        return {"row": name, "ms eager": 1e3 * seconds(captured, device), "note": "no graphs on a CPU"}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            captured()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured()
    for _ in range(5):
        graph.replay()
    for _ in range(8):  # the capture itself takes no step
        eager()
    pairs = zip(module.theta().values(), twin.theta().values(), strict=True)
    distance = max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)
    slow, fast = seconds(eager, device), seconds(graph.replay, device)
    return {"row": name, "ms eager": 1e3 * slow, "ms replayed": 1e3 * fast, "times eager": slow / fast, "gap": distance}


def checks(device: torch.device) -> list[dict[str, Any]]:
    """What a measurement and a lookahead cost in training steps, their waits and their memory."""
    names = ("sinusoid", "transformer", "omniglot", "miniimagenet") if device.type == "cuda" else ("sinusoid",)
    return [found for name in names for found in _check(name, rows_for(device)[name], device)]


def _check(name: str, row: Row, device: torch.device) -> list[dict[str, Any]]:
    support, query = row.data(torch.float32, device)
    torch.manual_seed(0)
    module = MetaLearningModule(row.network().to(device), row.loss, inner_lr=row.alpha, inner_steps=row.inner_steps)
    problem: MetaProblem = module.meta_problem((support, query))
    outer, cache = SGD(module.theta().values(), lr=1e-3), MeasurementCache()
    reports = [measure(problem, optimizer=outer, cache=cache)]  # the first one checks the second derivatives
    lookahead = Lookahead([problem], outer, 10, module.task_map)
    parts: dict[str, Step] = {
        "training step": lambda: meta_gradient(problem, tasks=module.task_map),
        "measure()": lambda: reports.append(measure(problem, optimizer=outer, cache=cache)),
        "lookahead of 10 steps": lookahead.run,
    }
    step_time, found = seconds(parts["training step"], device), []
    for title, part in parts.items():
        taken = step_time if title == "training step" else seconds(part, device, least=0.0)
        given = (dict(problem.params), support, query)
        one = {"row": name, "part": title, "ms": 1e3 * taken, "in steps": taken / step_time}
        one |= {"waits": waits(part, device, given), "MiB": memory(part, device)}
        found.append({**one, "products": reports[-1].hvps} if title == "measure()" else one)
    return found


def grid(device: torch.device, side: int, steps: int) -> tuple[dict[str, Any], PhaseDiagram]:
    """A phase diagram of the sinusoid network, all runs as one program."""
    torch.manual_seed(0)
    module = MetaLearningModule(mlp()).to(device)
    family = Sinusoid(10, 10)
    family.to(device)
    batches = [family.sample(10, episode_generator(0, "train", step)) for step in range(steps)]
    made = [module.meta_problem(tuple(tuple(x.to(device) for x in each) for each in batch)) for batch in batches]
    wait(device)
    began = time.perf_counter()
    diagram = phase_diagram(
        lambda step: made[step], np.logspace(-3, -0.3, side), np.logspace(-3, 0.3, side), steps, progress=False
    )
    wait(device)
    taken = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else float("nan")
    return {
        "grid": f"{side} x {side}",
        "steps": steps,
        "seconds": taken,
        "peak MiB": peak,
        "share trained": float(diagram.trained.mean()),
    }, diagram


def jax_rows(device: torch.device, folder: Path, most: float) -> list[dict[str, Any]]:
    """The same meta-steps in JAX (jit and vmap), in a process of its own, on the same card."""
    names = [name for name in _JAX if name in rows_for(device)]
    file = folder / "jax.json"
    file.unlink(missing_ok=True)
    # The rest of the card's memory is torch's.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    command = [sys.executable, "-m", "benchmarks.gpu.jax_steps", str(file), *names]
    command += [] if device.type == "cuda" else ["--small"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=most)
    except subprocess.TimeoutExpired:  # most of a row is its compilation
        found = json.loads(file.read_text()) if file.exists() else []
        late = [name for name in names if name not in {row["row"] for row in found}]
        return [*found, {"not measured": f"{', '.join(late)}: did not end in {most:.0f} s"}]
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no message")
    return json.loads(file.read_text())


def panel(name: str, device: torch.device, left: float, small: bool) -> dict[str, Any]:
    """A panel of the paper at its published size, with as many steps as fit the time that is left."""
    full = FULL[name]
    if small:
        full = replace(full, alphas=full.alphas[:3], betas=full.betas[:3], batch=2, judged=2)
    axes = full.alphas, full.betas

    def run(steps: int) -> float:
        family, judged = problems(full, device, 0)
        began = time.perf_counter()
        phase_diagram(family, *axes, steps, judged_on=judged, measure_every=0, progress=False)
        wait(device)
        return time.perf_counter() - began

    run(1)  # loads libraries
    few = 4
    each = run(few) / few
    steps = 8 if small else max(few, min(full.steps, int(0.8 * left / each)))
    taken = run(steps)
    return {
        "panel": name,
        "grid": f"{len(axes[0])} x {len(axes[1])}",
        "steps": steps,
        "of": full.steps,
        "seconds": taken,
        "seconds for all": taken / steps * full.steps,
    }
