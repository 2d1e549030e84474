"""The report of a run as one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
import platform
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from lightning_maml_guard.messages.advice_sentences import advised
from lightning_maml_guard.messages.notices import not_written
from lightning_maml_guard.messages.terminal import warn
from lightning_maml_guard.pages.events import Rollback, Row, happened, note_on_parameters, parameters_of, rollbacks, why
from lightning_maml_guard.pages.outcome import counted, outcome
from lightning_maml_guard.pages.record import RunRecord
from lightning_maml_guard.utils.checks import check_file
from lightning_maml_guard.utils.io import write_atomically

_SHOWN = 200  # rows of a table; a run whose state changes often would otherwise fill the page
_PACKAGES = ("lightning-maml-guard", "torch", "pytorch-lightning", "lightning", "numpy", "matplotlib")
_WORDS = {
    "safe": "the lookahead passes and both rates keep their limits",
    "edge": "a rate is beyond its critical value and the lookahead passes: the edge of stability",
    "unsafe": "the lookahead diverges, what was learned is lost, or trials at lower rates end clearly lower; without a "
    "lookahead, a rate is beyond its critical value",
    "unresolved": "no verdict: a rate lies within the interval of its critical value, or could not be judged",
}
_LAST_CHECK = (
    *("alpha", "alpha_c", "alpha_applied", "beta", "beta_c", "beta_applied", "exact_beta_c"),
    *("lambda_max", "lambda_min", "severity", "growth", "hvps", "seconds"),
)


class Picture(NamedTuple):
    """A figure, drawn for a wide page and for a phone, with what it shows in words and a note below it."""

    wide: Markup
    narrow: Markup
    shows: str
    note: str = ""


class Section(NamedTuple):
    """Pictures under one title."""

    title: str
    pictures: list[Picture]


def write(record: RunRecord, path: str | Path) -> Path:
    """Write the report, whole or not at all; the folder must exist. A disk that is full costs a warning."""
    check_file("path", path)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected argument `path` to lie in a folder that exists but got {str(path)!r}: there is no folder "
            f"{str(path.parent)!r}. Make it first, or write elsewhere."
        )
    text = page(record)
    try:
        write_atomically(path, text, mode=0o644)
    except OSError as error:
        warn(not_written("the report", path, error))
    return path


def page(record: RunRecord) -> str:
    """Compose the report."""
    here = Path(__file__).parent
    options: dict[str, Any] = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, auto_reload=False, **options
    )
    history, spelling = record.history, record.spelling
    made = rollbacks(record.events)
    rows = happened(history, record.events, spelling)
    return environment.get_template("report.html.j2").render(
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        record=record,
        outcome=outcome(record),
        checks=_checks(history),
        states=[(state, number) for state, number in Counter(each.status for each in history).items()],
        words=_WORDS,
        to_do="" if record.advice is None else advised(record.advice, spelling),
        sections=list(_sections(record, rows, made)) if history else [],
        rows=rows[-_SHOWN:],
        left_out=max(len(rows) - _SHOWN, 0),
        numbers=_numbers(history[-1]) if history else [],
        last_note=note_on_parameters(history[-1].step or 0, made) if history else "",
        reasons=why(history[-1], spelling) if history else [],
        settings=[(name, _shown(value)) for name, value in record.settings.items()],
        versions=_versions(),
    )


def _checks(history: Sequence[Any]) -> str:
    if not history:
        return "No check was made yet."
    span = f"steps {history[0].step} to {history[-1].step}" if len(history) > 1 else f"step {history[0].step}"
    return f"{counted(len(history), 'check')}, {span}"


def _sections(record: RunRecord, rows: Sequence[Row], made: Sequence[Rollback]) -> Iterator[Section]:
    from lightning_maml_guard.plots.region import safe_region
    from lightning_maml_guard.plots.run import run_history

    history = record.history
    options: dict[str, Any] = {
        "severities": record.severities,
        "divergence_ratio": record.divergence_ratio,
        "margin": record.margin,
        "losses": record.losses,
        "events": [(row.step, row.kind) for row in rows if row.step is not None],
        "rolled_back": [(each.to, each.at) for each in made],
        "end": record.steps,
    }
    shows = "Loss, state, rates and lookaheads over the training steps."
    yield Section("The run", [_picture(lambda width: run_history(history, width=width, **options)[0], shows)])
    if any(report.lambda_max > 0 and math.isfinite(report.alpha_c) for report in history):
        shows = "The region where the rates converge, and their path in it."
        yield Section(
            "Safe region", [_picture(lambda width: _on_new(width, lambda ax: safe_region(history, ax)), shows)]
        )
    seen = [report for report in history if report.ritz()[0]]
    if seen:
        worst, shown = max(seen, key=lambda report: report.lambda_max), [("Last spectrum", seen[-1])]
        if worst.lambda_max > 1.01 * seen[-1].lambda_max:
            shown.append(("Sharpest spectrum", worst))
        pictures = [_spectrum(*each, made) for each in shown]
        yield Section("Spectrum of the task loss's Hessian", pictures)


def _spectrum(title: str, report: Any, made: Sequence[Rollback]) -> Picture:
    from lightning_maml_guard.plots.spectrum import ritz_values

    whose = parameters_of(report.step or 0, made)
    heading = f"{title}, step {report.step}" + (f"\n({whose})" if whose else "")
    note = note_on_parameters(report.step or 0, made)
    shows = f"Ritz values at step {report.step}."
    return _picture(lambda width: _on_new(width, lambda ax: ritz_values(report, ax, title=heading)), shows, note, 5.4)


def _picture(draw: Callable[[float], Any], shows: str, note: str = "", wide: float = 8.8) -> Picture:
    from lightning_maml_guard.plots.style import NARROW
    from lightning_maml_guard.plots.svg import svg

    broad, narrow = (Markup(svg(draw(width))) for width in (wide, NARROW))
    return Picture(broad, narrow, shows, note)


def _on_new(width: float, draw: Callable[[Any], Any]) -> Any:
    """Draw on a new figure: the wider, the flatter."""
    from lightning_maml_guard.plots.style import NARROW_BELOW, new_figure

    figure = new_figure(width, 4.4 if width < NARROW_BELOW else 1.6 + 0.4 * width)
    draw(figure.subplots())
    return figure


def _numbers(report: Any) -> list[tuple[str, str, str]]:
    rows = []
    for name in _LAST_CHECK:
        value, ends = getattr(report, name), getattr(report, f"{name}_interval", (math.nan, math.nan))
        if not math.isnan(value):
            interval = "" if any(math.isnan(end) for end in ends) else f"{ends[0]:.4g} to {ends[1]:.4g}"
            rows.append((name, f"{value:.4g}", interval))
    return rows


def _shown(value: Any) -> Markup:
    text = getattr(value, "__qualname__", None) if callable(value) else None
    return Markup("(<wbr>").join(str(text or repr(value)).split("("))  # escapes the parts; a phone may break there


def _versions() -> list[tuple[str, str]]:
    found = [("Python", platform.python_version())]
    for package in _PACKAGES:
        try:
            found.append((package, version(package)))
        except PackageNotFoundError:
            continue
    return found
