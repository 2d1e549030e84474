"""A history as a pandas table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lightning_maml_guard.stability.report import StabilityReport

if TYPE_CHECKING:
    import pandas as pd


def frame(history: Sequence[StabilityReport]) -> pd.DataFrame:
    """Put reports into a table.

    Args:
        history: The reports.

    Returns:
        See :meth:`ConvergenceGuard.frame`.

    Raises:
        ModuleNotFoundError: If pandas is not installed.
    """
    try:
        import pandas as pd
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "guard.frame() needs pandas: pip install pandas. guard.history holds the same reports."
        ) from error
    named = [each.name for each in fields(StabilityReport) if each.name not in {"spectrum", "step"}]
    columns = [
        column
        for name in named
        for column in ((f"{name}_low", f"{name}_high") if name.endswith("_interval") else (name,))
    ]
    columns = [column.replace("_interval", "") for column in columns]
    columns += ["alpha_ratio", "beta_ratio", "poster_alpha_c"]
    steps = pd.Index([report.step for report in history], name="step", dtype="Int64")
    return pd.DataFrame([_row(report, named) for report in history], index=steps, columns=columns)


def _row(report: StabilityReport, named: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in named:
        value = getattr(report, name)
        if name.endswith("_interval"):
            short = name.removesuffix("_interval")
            row[f"{short}_low"], row[f"{short}_high"] = value
        else:
            row[name] = " ".join(value) if isinstance(value, tuple) else value
    derived = ("alpha_ratio", "beta_ratio", "poster_alpha_c")
    return {**row, **{name: getattr(report, name) for name in derived}}
