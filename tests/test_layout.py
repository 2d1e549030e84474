"""The house: imports go down only, Lightning is named in one file, files stay readable."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_maml_guard"
# What each room may import from: itself and these. Order is from the bottom up.
ALLOWED = {
    "_allocator": set(),
    "_warnings": set(),
    "_checks": set(),
    "_randomness": set(),
    "_folders": set(),
    "_functorch": set(),
    "_channels_last": {"_functorch"},
    "_first_block": {"_functorch"},
    "_norm_block": {"_channels_last", "_functorch"},
    "_vectorize": {"_checks", "_warnings"},
    "_lightning": {"_warnings"},
    "theory": {"_checks"},
    "curvature": {"_vectorize"},
    "networks": {"_channels_last", "_checks", "_first_block", "_functorch", "_norm_block"},
    "maml": {
        "theory",
        "curvature",
        "_allocator",
        "_checks",
        "_folders",
        "_functorch",
        "_lightning",
        "_randomness",
        "_vectorize",
        "_warnings",
    },
    "grid": {"theory", "curvature", "maml", "_checks", "_vectorize"},
    "phase_diagram": {"theory", "curvature", "maml", "grid", "_checks"},
    "tasks": {"_checks", "_folders", "_warnings", "_lightning"},
    "plots": {"guard", "grid", "curvature"},  # for type hints alone: see below
    "plots_run": {"guard"},  # likewise
    "guard": {
        "theory",
        "curvature",
        "maml",
        "plots",
        "plots_run",
        "_checks",
        "_lightning",
        "_randomness",
        "_vectorize",
        "_warnings",
    },
    "poster": {
        "curvature",
        "maml",
        "grid",
        "phase_diagram",
        "plots",
        "networks",
        "tasks",
        "_checks",
        "_cli_errors",
        "_vectorize",
    },
    "_words": {"guard", "_checks"},
    "_cli_errors": set(),
    "_cli_guard": {"guard", "_cli_errors", "_lightning"},
    "_cli_runs": {"guard", "tasks", "theory", "_cli_guard", "_lightning", "_warnings"},
    "cli": {"guard", "poster", "_cli_guard", "_cli_runs", "_lightning", "_words"},
}
FILES = sorted(PACKAGE.rglob("*.py"))


def room(path):
    part = path.relative_to(PACKAGE).parts[0]
    return part.removesuffix(".py")


def imports(path, *, type_checking=True):
    tree = ast.parse(path.read_text())
    skipped = set()
    if not type_checking:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.name != "__init__.py"], ids=lambda p: str(p.relative_to(PACKAGE))
)
def test_imports_go_down_only(path):
    for name in imports(path):
        if name.startswith("lightning_maml_guard."):
            target = name.split(".")[1]
            assert target == room(path) or target in ALLOWED[room(path)], f"{path} imports {name}"


def test_plots_meet_the_guard_in_type_hints_only():
    for name in ("plots.py", "plots_run.py"):
        assert not any(each.startswith("lightning_maml_guard") for each in imports(PACKAGE / name, type_checking=False))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lightning_is_named_in_one_file(path):
    named = {name.split(".")[0] for name in imports(path)} & {"lightning", "pytorch_lightning"}
    assert not named or path.name == "_lightning.py"


def test_only_the_command_line_prints():
    for path in FILES:
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printed = any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
        assert not printed or path.name in {"cli.py", "_cli_runs.py"} or path.parent.name == "poster", path


def test_theory_is_pure():
    for path in (PACKAGE / "theory").glob("*.py"):
        assert not any("nn" in name.split(".") for name in imports(path))


def test_the_public_names_are_there():
    import lightning_maml_guard as package

    for name in package.__all__:
        assert getattr(package, name).__module__.startswith("lightning_maml_guard")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = package.nonsense
    assert set(package.__all__) <= set(dir(package))
