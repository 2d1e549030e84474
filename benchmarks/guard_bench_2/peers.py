"""The guards of three packages on PyPI, by their own interfaces, on the norms and losses of recorded runs.

None of them needs more of a run than these: ``stabilityguard`` and ``traintools`` look at the norms of each parameter
and its gradient, for which stand-ins of one entry are given here, ``trainpulse`` at the loss, the norm and the rate.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.common.detectors import Series

PACKAGES = ("stabilityguard", "trainpulse", "traintools")
# The thresholds of trainpulse's monitors whose alerts are counted where its score is swept; its own are 5 and 100.
SWEPT = ((1.2, 1.0), (1.5, 3.0), (2.0, 10.0), (3.0, 30.0), (5.0, 100.0), (10.0, 300.0), (30.0, 1000.0))
RECORDS = 20  # validation losses per run that traintools' TrainGuard is given
ALERTS = ("stabilityguard", "trainpulse", "traintools GradientHealthMonitor", "traintools TrainGuard")


def installed(package: str) -> bool:
    """Return True if a package can be imported."""
    return importlib.util.find_spec(package) is not None


def peers(run: dict[str, Any]) -> dict[str, Series]:
    """Score a run by every peer that is installed.

    Args:
        run: What ``training.train`` returns of a run without a guard.

    Returns:
        Scores by name. Those of ALERTS are 1 where the peer speaks at its defaults and 0 elsewhere; the others are
        what it computes, or the number of thresholds that it passes.
    """
    found: dict[str, Series] = {}
    if installed("stabilityguard"):
        found |= _stabilityguard(run)
    if installed("trainpulse"):
        found |= _trainpulse(run)
    if installed("traintools"):
        found |= _traintools(run)
    return found


def _stabilityguard(run: dict[str, Any]) -> dict[str, Series]:
    from stabilityguard.core.spike_detector import SpikeDetector

    detector, alerts, ratios = SpikeDetector(), [], []
    for step, norms in enumerate(run["norms"]):
        layers = {str(at): norm for at, norm in enumerate(norms)}
        bad = {name for name, norm in layers.items() if not math.isfinite(norm)}
        spiked, _, means = detector.check(layers, bad)
        alerts.append((step, float(spiked)))
        known = [layers[name] / mean for name, mean in means.items() if mean > 0]
        ratios.append((step, math.inf if bad else max(known, default=0.0)))
    return {"stabilityguard": alerts, "stabilityguard: norm / its mean": ratios}


def _trainpulse(run: dict[str, Any]) -> dict[str, Series]:
    from trainpulse import Monitor, MonitorConfig

    def alerted(config: Any) -> list[bool]:
        monitor, found = Monitor(config), []
        for step, norms in enumerate(run["norms"]):
            alerts = monitor.log("loss", step, run["losses"][step])
            alerts += monitor.log("grad_norm", step, float(np.linalg.norm(norms)))
            alerts += monitor.log("learning_rate", step, run["rates"][step])
            found.append(bool(alerts))
        return found

    monitors = [
        alerted(MonitorConfig(loss_spike_threshold=spike, grad_norm_threshold=norm, plateau_patience=10**9))
        for spike, norm in SWEPT
    ]
    return {
        "trainpulse": [(step, float(each)) for step, each in enumerate(alerted(MonitorConfig()))],
        "trainpulse: thresholds swept": [
            (step, float(sum(each))) for step, each in enumerate(zip(*monitors, strict=True))
        ],
    }


def _traintools(run: dict[str, Any]) -> dict[str, Series]:
    from traintools import GradientHealthMonitor, TrainGuard

    sizes = len(run["norms"][0]) if run["norms"] else 0
    model = nn.ParameterList([nn.Parameter(torch.zeros(1)) for _ in range(sizes)])
    for each in model:
        each.grad = torch.zeros(1)
    monitor, alerts, ratios = GradientHealthMonitor(), [], []
    for step, norms in enumerate(run["norms"]):
        for each, norm, size in zip(model, norms, run["sizes"][step], strict=True):
            each.data.fill_(size)
            assert each.grad is not None
            each.grad.fill_(norm)
        result = monitor.inspect(model, step=step, lr=run["rates"][step])
        alerts.append((step, float(not result.ok)))
        ratios.append((step, math.inf if result.global_update_ratio is None else result.global_update_ratio))
    losses, stops = run["after"], []
    guard, every = TrainGuard(), max((len(losses) - 1) // RECORDS, 1)
    state = np.random.get_state()
    np.random.seed(0)  # it draws from the global generator
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(every, len(losses), every):
            if not math.isfinite(losses[step]):  # on which it fails with an error: counted as an alert
                stops.append((step, 1.0))
                break
            guard.record(step=step, val_loss=losses[step])
            stops.append((step, float(guard.evaluate().should_stop)))
    np.random.set_state(state)
    return {
        "traintools GradientHealthMonitor": alerts,
        "traintools: update / weight": ratios,
        "traintools TrainGuard": stops,
    }
