"""Reports as plain values, so that a checkpoint can hold them and load with ``weights_only``."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from lightning_maml_guard.curvature.lanczos import Tridiagonal
from lightning_maml_guard.curvature.pyhessian import PowerIteration
from lightning_maml_guard.guard.estimate import Spectrum
from lightning_maml_guard.guard.monitor import StabilityReport


def to_plain(report: StabilityReport) -> dict[str, Any]:
    """Convert a report to dicts, lists and numbers.

    Args:
        report: The report.

    Returns:
        Its fields.
    """
    plain = asdict(report)
    spectrum = report.spectrum
    plain["spectrum"] = {
        "runs": [[list(part) for part in run] for run in spectrum.runs],
        "power": None if spectrum.power is None else list(spectrum.power),
        "values": list(spectrum.values),
        "rounding": spectrum.rounding,
        "matvecs": spectrum.matvecs,
    }
    return {name: list(value) if isinstance(value, tuple) else value for name, value in plain.items()}


def from_plain(plain: dict[str, Any]) -> StabilityReport:
    """Restore a report; fields of a newer or older version that are not known here are left out.

    Args:
        plain: What :func:`to_plain` made.

    Returns:
        The report.
    """
    known = {field.name for field in fields(StabilityReport)}
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in plain.items() if name in known}
    spectrum = dict(plain["spectrum"])
    power = spectrum.get("power")
    values["spectrum"] = Spectrum(
        runs=tuple(Tridiagonal(tuple(main), tuple(off)) for main, off in spectrum.get("runs", [])),
        power=None if power is None else PowerIteration(*power),
        values=tuple(spectrum.get("values", ())),
        rounding=spectrum.get("rounding", 0.0),
        matvecs=spectrum.get("matvecs", 0),
    )
    return StabilityReport(**values)
