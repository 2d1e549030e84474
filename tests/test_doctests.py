"""What docstrings show runs when pasted, and public names say what they take."""

import doctest
import inspect
import os
import pkgutil
import re
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path

import pytest

import lightning_maml_guard

PUBLIC = [
    import_module(info.name)
    for info in pkgutil.walk_packages(lightning_maml_guard.__path__, "lightning_maml_guard.")
    if not any(part.startswith("_") for part in info.name.split("."))
]
# With no names but those that the example imports: a reader pastes it.
FOUND = [
    test
    for module in PUBLIC
    for test in doctest.DocTestFinder(exclude_empty=True).find(module, globs={})
    if test.examples
]
# Their examples stand with the functions that give them.
RESULTS = {
    "CheckReport",
    "CriticalRates",
    "GuardWarning",
    "MeasurementCache",
    "PhaseDiagram",
    "RateSuggestion",
    "StabilityReport",
}


def test_the_main_names_have_an_example():
    assert {test.name.rsplit(".", 1)[-1] for test in FOUND} >= set(lightning_maml_guard.__all__) - RESULTS


@pytest.mark.parametrize("example", FOUND, ids=lambda example: example.name)
def test_an_example_does_what_it_says(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    outcome = runner.run(example, out=told.append)
    assert outcome.attempted and not outcome.failed, "".join(told)
    assert not os.listdir(tmp_path)


def expanded(pattern):
    """The alternatives of a pattern with braces, the innermost first."""
    braces = re.search(r"\{([^{}]*)\}", pattern)
    if braces is None:
        return [pattern]
    before, after = pattern[: braces.start()], pattern[braces.end() :]
    return [each for part in braces[1].split(",") for each in expanded(before + part + after)]


def documented_in_full():
    """The modules that ruff's docstring rules apply to."""
    root, settings = Path(lightning_maml_guard.__file__).parents[1], Path(__file__).parents[1] / "pyproject.toml"
    (pattern,) = re.findall(r'^"!(\{.*\})" = \["D1", "DOC"\]$', settings.read_text(), re.MULTILINE)
    files = {path for each in expanded(pattern) for path in root.glob(each)}
    return [module for module in PUBLIC if Path(module.__file__) in files]


def described():
    """Public functions, methods and constructors (their classes) of the modules that users import from."""
    for module in documented_in_full():
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isfunction(value) or (inspect.isclass(value) and "__init__" in vars(value)):
                yield f"{module.__name__}.{name}", value
            for method, function in vars(value).items() if inspect.isclass(value) else ():
                if inspect.isfunction(function) and not method.startswith("_"):
                    yield f"{module.__name__}.{name}.{method}", function


# Ruff asks for docstrings and Returns and completes an Args section: that there is one, and a constructor's, is left.
def test_a_docstring_of_several_lines_tells_of_every_argument():
    missing, seen = [], 0
    for name, value in described():
        text = inspect.cleandoc(value.__doc__ or "")
        if "\n" in text and "which lists the arguments" not in text:
            # A dataclass tells of the fields it adds, and its base of those it has.
            bases = value.__mro__[1:-1] if inspect.isclass(value) and is_dataclass(value) else ()
            lines = [line for each in (text, *(base.__doc__ for base in bases)) for line in each.splitlines()]
            told = {line.strip().lstrip("*").partition(":")[0] for line in lines} | {"self", "cls"}
            missing += [f"{name}({each})" for each in inspect.signature(value).parameters if each not in told]
            seen += 1
    assert not missing and seen > 80
