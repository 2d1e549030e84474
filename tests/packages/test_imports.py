"""What an import brings along, seen from fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import lightning_maml_guard

# Callback, modules and what trains with them; everything else is mathematics.
OF_LIGHTNING = {
    "ConvergenceGuard",
    "MetaLearning",
    "MetaLearningModule",
    "RateFinder",
    "TaskDataModule",
    "suggest_rates",
}
HEAVY = ["pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities", "torchmetrics", "matplotlib"]
HEAVY += ["pandas", "scipy", "pyhessian", "torch._dynamo"]
CODE = """
import sys
import lightning_maml_guard
assert "torch" not in sys.modules
from lightning_maml_guard import {names}
import lightning_maml_guard.networks, lightning_maml_guard.tasks.regression, lightning_maml_guard.plots
print(*(name for name in {heavy} if name in sys.modules))
"""


def test_the_mathematics_brings_neither_lightning_nor_what_draws():
    pure = sorted(set(lightning_maml_guard.__all__) - OF_LIGHTNING)
    code = CODE.format(names=", ".join(pure), heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert not done.stdout.strip()


def test_type_checkers_and_dir_see_the_names_that_are_imported_on_first_use():
    tree = ast.parse(Path(lightning_maml_guard.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    told = {alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert told == set(lightning_maml_guard._HOMES) == set(lightning_maml_guard.__all__) - {"GuardWarning"}
    assert told <= set(dir(lightning_maml_guard))


def test_help_and_an_error_about_a_word_bring_neither_torch_nor_lightning():
    code = """
import sys
from lightning_maml_guard.cli.main import main
try:
    main({words})
except SystemExit as stopped:
    assert stopped.code == {status}, stopped.code
else:
    raise AssertionError("no exit")
assert not {{"torch", "pytorch_lightning", "lightning", "jsonargparse"}} & set(sys.modules)
"""
    for words, status in ((["--help"], 0), (["cifar"], 2), (["fit", "sinusoid", "--guard", "maybe"], 2)):
        given = code.format(words=words, status=status)
        done = subprocess.run([sys.executable, "-c", given], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "sinusoid" in done.stdout + done.stderr


def test_the_command_line_knows_the_actions_and_commands_that_there_are():
    from lightning_maml_guard.cli.arguments import ACTIONS as WORDS
    from lightning_maml_guard.cli.arguments import DESCRIPTIONS
    from lightning_maml_guard.cli.commands import RUNS
    from lightning_maml_guard.guard.actions import ACTIONS

    assert tuple(ACTIONS) == WORDS and set(RUNS) == set(DESCRIPTIONS) - {"phase-diagram"}
