"""The examples in the docstrings are run."""

import doctest
import os
import pkgutil
from importlib import import_module

import pytest

import lightning_maml_guard

FOUND = [
    test
    for info in pkgutil.walk_packages(lightning_maml_guard.__path__, "lightning_maml_guard.")
    for test in doctest.DocTestFinder(exclude_empty=True).find(import_module(info.name))
    if test.examples
]


def test_the_main_names_have_an_example():
    shown = {test.name.rsplit(".", 1)[-1] for test in FOUND}
    assert {
        "ConvergenceGuard",
        "MetaLearningModule",
        "critical_rates",
        "phase_diagram",
        "stability_limit",
        "suggest_rates",
    } <= shown


@pytest.mark.parametrize("example", FOUND, ids=lambda example: example.name)
def test_an_example_does_what_it_says(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    outcome = runner.run(example, out=told.append)
    assert outcome.attempted and not outcome.failed, "".join(told)
    assert not os.listdir(tmp_path)
