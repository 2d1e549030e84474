"""The report of a run as one HTML page that needs nothing but itself."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Sequence
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lightning_maml_guard.guard.loggers import warn
from lightning_maml_guard.guard.report import CheckReport
from lightning_maml_guard.guard.state import Event
from lightning_maml_guard.lookahead.lookahead import LookaheadOptions
from lightning_maml_guard.messages.notices import not_written
from lightning_maml_guard.messages.sentences import cause, sentence, sentences
from lightning_maml_guard.messages.spelling import Spelling
from lightning_maml_guard.utils.checks import check_file
from lightning_maml_guard.utils.io import write_atomically

_SHOWN = 200  # rows of a table; a run whose state changes often would otherwise fill the page
_PACKAGES = ("lightning-maml-guard", "torch", "pytorch-lightning", "lightning", "numpy", "matplotlib")
_WORDS = {
    "safe": "the lookahead passes and both rates keep their limits",
    "edge": "a rate is beyond its critical value and the lookahead passes: the edge of stability",
    "unsafe": "the lookahead diverges, or, without one, a rate is beyond its critical value",
    "unresolved": "the measurement does not say",
}
_STYLE = Path(__file__).with_name("html_report.css")


class Reported(Protocol):
    """What a report reads of a guard."""

    margin: float
    lookahead: LookaheadOptions
    spelling: Spelling

    @property
    def history(self) -> list[CheckReport]:
        """The checks."""

    @property
    def severities(self) -> list[tuple[int, float]]:
        """The lookaheads."""

    @property
    def events(self) -> list[Event]:
        """Rollbacks, stops and notices."""

    @property
    def stopped_step(self) -> int | None:
        """Step at which the guard stopped the run."""

    @property
    def stopping_reason(self) -> str | None:
        """Why."""

    def settings(self) -> dict[str, Any]:
        """The guard's arguments."""


def write(guard: Reported, path: str | Path) -> Path:
    """Write the report, whole or not at all; the folder must exist. A disk that is full costs a warning."""
    check_file("path", path)
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Expected argument `path` to lie in a folder that exists but got {str(path)!r}: there is no folder "
            f"{str(path.parent)!r}. Make it first, or write elsewhere."
        )
    text = page(guard)
    try:
        write_atomically(path, text, mode=0o644)
    except OSError as error:
        warn(not_written("the report", path, error))
    return path


def page(guard: Reported) -> str:
    """Compose the report."""
    history = guard.history
    body = [_head(guard), *_pictures(guard)] if history else [_head(guard), "<p>No check was made yet.</p>"]
    rows = happened(history, guard.events, guard.spelling)
    body += [_happened(rows), _last(history, guard.spelling), _configuration(guard), _versions()]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>ConvergenceGuard: report of a run</title>\n<style>\n{_STYLE.read_text(encoding='utf-8')}</style>\n"
        "</head>\n<body>\n<main>\n" + "\n".join(part for part in body if part) + "\n</main>\n</body>\n</html>\n"
    )


def _badge(state: str) -> str:
    return f'<span class="badge {escape(state)}">{escape(state)}</span>'


def _head(guard: Reported) -> str:
    history = guard.history
    lines = ["<header>", "<h1>ConvergenceGuard: report of a run</h1>"]
    if history:
        last = history[-1]
        count = {state: sum(report.status == state for report in history) for state in _WORDS}
        counted = " ".join(f"<li>{_badge(state)} {number}</li>" for state, number in count.items() if number)
        checks = f"{len(history)} check" + ("s" if len(history) > 1 else "")
        span = f"{checks}, steps {history[0].step} to {last.step}" if len(history) > 1 else f"1 check, step {last.step}"
        meaning = f"{_badge(last.status)}: {escape(_WORDS.get(last.status, ''))}"
        lines.append(f'<p class="lead">{span}. At the last one the run is {meaning}.</p>')
        lines.append(f'<ul class="counts">{counted}</ul>')
    if guard.stopped_step is not None:
        reason = escape(guard.stopping_reason or "")
        lines.append(f'<p class="stop"><strong>Stopped at step {guard.stopped_step}.</strong> {reason}</p>')
    return "\n".join([*lines, "</header>"])


def _pictures(guard: Reported) -> Iterable[str]:
    from lightning_maml_guard.plots.region import safe_region
    from lightning_maml_guard.plots.run import run_history
    from lightning_maml_guard.plots.spectrum import ritz_values
    from lightning_maml_guard.plots.style import new_figure
    from lightning_maml_guard.plots.svg import svg

    history, ratio = guard.history, guard.lookahead.divergence_ratio
    figure, _ = run_history(history, severities=guard.severities, divergence_ratio=ratio, margin=guard.margin)
    yield _section(
        "The run over its checks", _figure(svg(figure), "State, ratios and lookaheads over the training steps.")
    )
    if any(report.lambda_max > 0 and math.isfinite(report.alpha_c) for report in history):
        figure = new_figure(7.2, 4.8)
        safe_region(history, ax=figure.subplots())
        yield _section(
            "Safe region", _figure(svg(figure), "The region where the rates converge, and their path in it.")
        )
    seen = [report for report in history if report.ritz()[0]]
    if seen:
        worst = max(seen, key=lambda report: report.lambda_max)
        shown = [("Last spectrum", seen[-1])]
        if worst.lambda_max > 1.01 * seen[-1].lambda_max:
            shown.append(("Sharpest spectrum", worst))
        drawn = ""
        for title, report in shown:
            figure, _ = ritz_values(report, title=f"{title}, step {report.step}")
            drawn += _figure(svg(figure), f"Ritz values at step {report.step}.")
        yield _section("Spectrum of the task loss's Hessian", f'<div class="pair">{drawn}</div>')


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>"


def _figure(drawing: str, caption: str) -> str:
    return f'<figure role="img" aria-label="{escape(caption)}">{drawing}</figure>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    top = "".join(f"<th>{escape(each)}</th>" for each in head)
    inner = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    heading = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll"><table class="{kind}">{heading}<tbody>\n{inner}\n</tbody></table></div>'


def _happened(rows_found: Sequence[Row]) -> str:
    if not rows_found:
        return _section("What happened", "<p>Nothing: no change of state, no cap, no rollback.</p>")
    left_out = len(rows_found) - _SHOWN
    note = f"<p>The latest {_SHOWN}; {left_out} earlier ones are left out.</p>" if left_out > 0 else ""
    rows = [
        [
            "" if each.step is None else str(each.step),
            _badge(each.kind) if each.kind in _WORDS else escape(each.kind),
            escape(each.what),
            escape(each.why),
        ]
        for each in rows_found[-_SHOWN:]
    ]
    return _section("What happened", note + _table(["step", "event", "what", "why"], rows, "events"))


def _last(history: Sequence[CheckReport], spelling: Spelling) -> str:
    if not history:
        return ""
    report = history[-1]
    rows = []
    for name, low_high in (
        ("alpha", None),
        ("alpha_c", report.alpha_c_interval),
        ("alpha_applied", None),
        ("beta", None),
        ("beta_c", report.beta_c_interval),
        ("beta_applied", None),
        ("exact_beta_c", report.exact_beta_c_interval),
        ("lambda_max", report.lambda_max_interval),
        ("lambda_min", None),
        ("severity", None),
        ("growth", None),
        ("hvps", None),
        ("seconds", None),
    ):
        value = getattr(report, name)
        if math.isnan(value):
            continue
        known = low_high is not None and not any(math.isnan(end) for end in low_high)
        interval = f"{low_high[0]:.4g} to {low_high[1]:.4g}" if known and low_high is not None else ""
        rows.append([f"<code>{name}</code>", f"{value:.4g}", interval])
    why = "".join(f"<p>{escape(text)}</p>" for text in _why(report, spelling))
    return _section("The last check", why + _table(["", "value", "interval"], rows, "numbers"))


def _configuration(guard: Reported) -> str:
    rows = [[f"<code>{escape(name)}</code>", escape(_shown(value))] for name, value in guard.settings().items()]
    return _section("Configuration of the guard", _table([], rows, "settings"))


def _shown(value: Any) -> str:
    text = getattr(value, "__qualname__", None) if callable(value) else None
    return str(text or repr(value))


def _versions() -> str:
    found = {"Python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    rows = [[escape(name), escape(each)] for name, each in found.items()]
    return _section("Versions", _table([], rows, "settings"))


class Row(NamedTuple):
    """One thing that happened: a state, a cap, a rollback, a stop or a notice; the step may be unknown."""

    step: int | None
    kind: str
    what: str
    why: str


def happened(history: Sequence[CheckReport], events: Sequence[Event], spelling: Spelling) -> list[Row]:
    """List what happened in a run in the order of its steps; what has no known step comes last."""
    found: list[Row] = []
    for before, report in zip([None, *history], history, strict=False):
        found += _changes(before, report, spelling)
    # After the changes, so that of one step its state comes before what the guard did.
    found += [Row(each.step, each.kind, "", " ".join(sentences(each.reasons, spelling))) for each in events]
    return sorted(found, key=lambda row: math.inf if row.step is None else row.step)


def _changes(before: CheckReport | None, report: CheckReport, spelling: Spelling) -> list[Row]:
    step, why, found = report.step or 0, " ".join(_why(report, spelling)), []
    if before is None or before.status != report.status:
        what = "first check" if before is None else f"was {before.status}"
        found.append(Row(step, report.status, what, why))
        why = ""
    for name in ("alpha", "beta"):
        scheduled, applied = getattr(report, name), getattr(report, f"{name}_applied")
        earlier = math.nan if before is None else getattr(before, f"{name}_applied")
        held = before is not None and earlier < getattr(before, name)
        capped = applied < scheduled
        if not (capped or held) or math.isclose(applied, earlier, rel_tol=1e-9):
            continue
        lowered = capped and not (held and applied > earlier)
        start = earlier if held else scheduled
        found.append(
            Row(
                step,
                "capped" if lowered else "released",
                f"{name} {start:.3g} → {applied:.3g}",
                why if lowered and why else f"scheduled {scheduled:.3g}, {name}_c = {getattr(report, f'{name}_c'):.3g}",
            )
        )
    return found


def _why(report: CheckReport, spelling: Spelling) -> list[str]:
    """Why a report is what it is, and what to do unless the guard did it."""
    acted = report.alpha_applied < report.alpha or report.beta_applied < report.beta
    return [(cause if acted else sentence)(each, spelling) for each in report.findings]
