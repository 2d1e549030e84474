"""The house: imports go down only, between rooms and inside the large ones; Lightning is named in one file."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lightning_maml_guard"
# From the bottom up: a room imports from itself and from rooms before it.
ROOMS = (
    "utils",
    "theory",
    "messages",
    "kernels",
    "linalg",
    "sharding",
    "networks",
    "tasks",
    "maml",
    "optim",
    "stability",
    "lookahead",
    "phase",
    "plots",
    "pages",
    "guard",
    "tuner",
    "cli",
)
# The same inside the two largest rooms; files of one tuple do not import each other.
LAYERS = {
    "stability": (
        ("inner_limit", "krylov_stopping", "problems", "verdict"),
        ("estimators", "objective"),
        ("adaptation", "hvp", "options", "report", "training_match"),
        ("alpha_c", "beta_c"),
        ("measurement",),
        ("measure",),
    ),
    "guard": (
        ("report", "schedule", "state_machine"),
        ("loggers",),
        ("rescale", "state"),
        ("actions",),
        ("settings",),
        ("run",),
        ("look",),
        ("advising", "rollback"),
        ("judgement",),
        ("check",),
        ("convergence_guard",),
    ),
}
FILES = sorted(PACKAGE.rglob("*.py"))
# What only the command line may do.
PRINTING = "cli"


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


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
    "path",
    [p for p in FILES if p.parent != PACKAGE or p.name != "__init__.py"],
    ids=lambda p: str(p.relative_to(PACKAGE)),
)
def test_imports_go_down_only(path):
    own = ROOMS.index(room(path))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lightning_maml_guard" and len(parts) > 1:
            assert ROOMS.index(parts[1]) <= own, f"{path} imports {name}"


@pytest.mark.parametrize("name", LAYERS)
def test_imports_go_down_inside_a_room(name):
    level = {file: height for height, files in enumerate(LAYERS[name]) for file in files}
    found = {path.stem: path for path in (PACKAGE / name).glob("*.py") if path.stem != "__init__"}
    assert set(found) == set(level)
    for stem, path in found.items():
        for module in imports(path):
            if module.startswith(f"lightning_maml_guard.{name}."):
                target = module.split(".")[2]
                assert level[target] < level[stem], f"{path} imports {module}"


def test_plots_meet_what_they_draw_in_type_hints_only():
    for path in (PACKAGE / "plots").glob("*.py"):
        rooms = {name.split(".")[1] for name in imports(path, type_checking=False) if name.startswith("lightning_maml")}
        assert rooms <= {"plots"}


def test_no_room_is_too_full():
    for folder in {path.parent for path in FILES}:
        assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= 15, folder


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lightning_is_named_in_one_file(path):
    named = {name.split(".")[0] for name in imports(path)} & {"lightning", "pytorch_lightning"}
    assert not named or path.name == "lightning_compat.py"


def test_only_the_command_line_prints():
    for path in FILES:
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        printed = any(isinstance(function, ast.Name) and function.id == "print" for function in calls)
        assert not printed or room(path) == PRINTING, path


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
