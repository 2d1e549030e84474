"""Measures the package's structure: ``python -m benchmarks.house [--against CHECKOUT] [--static]``.

Prints files and lines per room (a folder of the package), which room imports which, the longest files, the share of
docstrings and comments, and how many files one check and one training step of a sinusoid run go through. ``--against``
prints another checkout beside this one, such as ``git worktree add /tmp/before c325147``. ``--static`` leaves out the
run; the rest needs the standard library alone.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import subprocess
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_maml_guard"
# Users import from these modules directly; the other public names are in the package's __all__.
PUBLIC_MODULES = ("networks", "tasks")
LONGEST = 5
Definition = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass
class Checkout:
    """The package in a checkout, parsed."""

    root: Path
    trees: dict[Path, ast.Module] = field(init=False)
    lengths: dict[Path, int] = field(init=False)

    def __post_init__(self) -> None:
        self.package = self.root / PACKAGE
        texts = {path: path.read_text() for path in sorted(self.package.rglob("*.py"))}
        self.trees = {path: ast.parse(text) for path, text in texts.items()}
        self.lengths = {path: len(text.splitlines()) for path, text in texts.items()}

    def room(self, path: Path) -> str:
        """The folder of a file, or the file itself where it lies in no folder."""
        return path.relative_to(self.package).parts[0].removesuffix(".py")

    @cached_property
    def rooms(self) -> dict[str, list[Path]]:
        """Files of each room, without the package's own ``__init__.py``."""
        found: dict[str, list[Path]] = defaultdict(list)
        for path in self.trees:
            if path != self.package / "__init__.py":
                found[self.room(path)].append(path)
        return dict(found)

    @cached_property
    def order(self) -> list[str]:
        """The rooms from the bottom up, as ``ROOMS`` of ``tests/test_layout.py`` has them; empty without it."""
        layout = self.root / "tests" / "test_layout.py"
        for node in ast.parse(layout.read_text()).body if layout.exists() else ():
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS":
                return list(ast.literal_eval(node.value))
        return []

    @cached_property
    def imports(self) -> dict[str, Counter[str]]:
        """How many import statements of a room name each other room, those in functions and for types included."""
        found: dict[str, Counter[str]] = {room: Counter() for room in self.rooms}
        for room, paths in self.rooms.items():
            for path in paths:
                for name in _imported(self.trees[path]):
                    other = name.split(".")[1] if name.startswith(f"{PACKAGE}.") else ""
                    if other in self.rooms and other != room:
                        found[room][other] += 1
        return found

    def files(self, room: str) -> int:
        """Files of a room; an ``__init__.py`` is no place to look for anything."""
        return len([path for path in self.rooms[room] if path.name != "__init__.py"])

    def upward(self) -> list[str]:
        """Imports that go up in the order of the rooms; without an order, pairs of rooms that import each other."""
        pairs = [(room, other) for room, others in self.imports.items() for other in others]
        if self.order:
            known = [pair for pair in pairs if set(pair) <= set(self.order)]
            return [f"{a} -> {b}" for a, b in known if self.order.index(b) > self.order.index(a)]
        return [f"{a} <-> {b}" for a, b in pairs if a < b and (b, a) in pairs]

    @cached_property
    def public_names(self) -> set[str]:
        """``__all__`` of the package."""
        for node in ast.walk(self.trees[self.package / "__init__.py"]):
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
                return set(ast.literal_eval(node.value))
        return set()

    def docstrings(self) -> tuple[int, int]:
        """Lines of docstrings on public names, and on everything else."""
        public = private = 0
        for path, tree in self.trees.items():
            for names, node in _definitions(tree):
                if ast.get_docstring(node, clean=False) is None:
                    continue
                text = node.body[0]
                length = (text.end_lineno or text.lineno) - text.lineno + 1
                if self._is_public(path, names):
                    public += length
                else:
                    private += length
        return public, private

    def _is_public(self, path: Path, names: tuple[str, ...]) -> bool:
        if any(name.startswith("_") and not name.endswith("__") for name in names):
            return False
        if path == self.package / "__init__.py" or self.room(path) in PUBLIC_MODULES:
            return True
        return bool(names) and names[0] in self.public_names

    def comments(self) -> int:
        """Lines that hold a comment."""
        count = 0
        for path in self.trees:
            with tokenize.open(path) as file:
                count += sum(token.type == tokenize.COMMENT for token in tokenize.generate_tokens(file.readline))
        return count


def _imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE:
            yield from (f"{PACKAGE}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def _definitions(node: ast.AST, names: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Definition]]:
    """The module, its classes and functions, each with the names that lead to it."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _definitions(child, (*names, child.name))
        else:
            yield from _definitions(child, names)
    if isinstance(node, Definition):
        yield names, node


class Trace:
    """Records the package's files in which a Python function runs, between ``start`` and ``stop``."""

    def __init__(self, package: Path) -> None:
        self.package = f"{package}{os.sep}"
        self.files: set[str] = set()
        self.changes = 0
        self._stack: list[str] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        """Profile function; a change of file is a call into another file of the package, and the return from it."""
        if not frame.f_code.co_filename.startswith(self.package) or frame.f_code.co_name == "<module>":
            return
        name = frame.f_code.co_filename.removeprefix(self.package)
        if event == "call":
            self.files.add(name)
            self.changes += bool(self._stack) and self._stack[-1] != name
            self._stack.append(name)
        elif event == "return" and self._stack:
            self._stack.pop()
            self.changes += bool(self._stack) and self._stack[-1] != name


def trace() -> dict[str, Any]:
    """Train 31 steps of the sinusoid example on one thread; trace the last check and the training step after it."""
    import torch
    from pytorch_lightning import Trainer, seed_everything
    from torch.optim import SGD

    import lightning_maml_guard
    from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule
    from lightning_maml_guard.networks import mlp
    from lightning_maml_guard.tasks.regression import Sinusoid

    seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    os.environ["LMG_VECTORIZE"] = "rule"  # no choice by the clock
    package = Path(lightning_maml_guard.__file__).parent
    traces = {"check": Trace(package), "training step": Trace(package)}

    class Guard(ConvergenceGuard):
        def on_train_batch_start(self, *args: Any) -> None:
            if len(self.history) != 3:
                return super().on_train_batch_start(*args)
            sys.setprofile(traces["check"])
            super().on_train_batch_start(*args)
            sys.setprofile(None)
            if len(self.history) == 3:  # no check was due at this step
                traces["check"] = Trace(package)

    class Module(MetaLearningModule):
        def training_step(self, *args: Any) -> Any:
            if self.global_step != 30:
                return super().training_step(*args)
            sys.setprofile(traces["training step"])
            loss = super().training_step(*args)
            sys.setprofile(None)
            return loss

    module = Module(mlp(), inner_lr=0.01, optimizer=lambda parameters: SGD(parameters, lr=0.05))
    trainer = Trainer(
        max_steps=31,
        accelerator="cpu",
        callbacks=[Guard(every_n_steps=10)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, TaskDataModule(Sinusoid(shots=10), meta_batch_size=25))
    return {name: {"files": sorted(each.files), "changes": each.changes} for name, each in traces.items()}


def traced(root: Path) -> dict[str, Any]:
    """Run ``trace`` with the package of this checkout, in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, str(Path(__file__).resolve()), "--trace"]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"The traced run in {root} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def figures(checkout: Checkout, runs: dict[str, Any] | None) -> dict[str, str]:
    """The figures of one checkout, one line of text each."""
    rooms, total = checkout.rooms, sum(checkout.lengths.values())
    public, private = checkout.docstrings()
    upward, comments = checkout.upward(), checkout.comments()
    fullest = max(rooms, key=checkout.files)
    found = {
        "files": str(len(checkout.trees)),
        "lines": str(total),
        "rooms": f"{len(rooms)}, the fullest {fullest} with {checkout.files(fullest)} files",
        "imports that go up" if checkout.order else "rooms that import each other": ", ".join(upward) or "none",
        "docstring lines": f"{public + private} ({(public + private) / total:.1%})",
        "  on public names": str(public),
        "  on the rest": str(private),
        "comments per 100 lines": f"{100 * comments / total:.1f}",
    }
    for name, run in (runs or {}).items():
        files = run["files"]
        by_room = Counter(file.split(os.sep)[0].removesuffix(".py") for file in files)
        parts = ", ".join(f"{room} {count}" for room, count in by_room.most_common(3))
        found[f"files that one {name} runs through"] = f"{len(files)} ({parts})"
        found[f"changes of file in one {name}"] = str(run["changes"])
    return found


def room_table(checkout: Checkout) -> Iterator[str]:
    """Files, lines and imports of every room, from the bottom up where the order is known."""
    place = {room: index for index, room in enumerate(checkout.order)}
    for room in sorted(checkout.rooms, key=lambda each: (place.get(each, -1), each)):
        lines = sum(checkout.lengths[path] for path in checkout.rooms[room])
        names = sorted(checkout.imports[room], key=lambda each: (place.get(each, -1), each))
        yield f"{room:16s}{checkout.files(room):5d}{lines:7d}   {', '.join(names) or '-'}"


def report(checkout: Checkout) -> None:
    """Print the rooms and the longest files of one checkout."""
    print(f"{checkout.root}\n\n{'room':16s}{'files':>5s}{'lines':>7s}   imports from")
    print("\n".join(room_table(checkout)))
    print("\nlongest files")
    for path in sorted(checkout.lengths, key=lambda each: -checkout.lengths[each])[:LONGEST]:
        print(f"{checkout.lengths[path]:5d}  {path.relative_to(checkout.package)}")
    print()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.house", description=__doc__)
    parser.add_argument("--against", type=Path, help="another checkout, printed beside this one")
    parser.add_argument("--static", action="store_true", help="without the traced run")
    parser.add_argument("--files", action="store_true", help="list the files that the traced run goes through")
    parser.add_argument("--trace", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.trace:
        print(json.dumps(trace()))
        return
    checkouts = [Checkout(root.resolve()) for root in (ROOT, given.against) if root]
    runs = [None if given.static else traced(checkout.root) for checkout in checkouts]
    for checkout in checkouts:
        report(checkout)
    columns = [figures(checkout, run) for checkout, run in zip(checkouts, runs, strict=True)]
    for name in dict.fromkeys(name for column in columns for name in column):
        print(f"{name:42s}" + "".join(f"{column.get(name, '-'):44s}" for column in columns).rstrip())
    for checkout, run in zip(checkouts, runs, strict=True):
        for name, found in (run or {}).items() if given.files else ():
            print(f"\n{checkout.root}: one {name}\n  " + "\n  ".join(found["files"]))


if __name__ == "__main__":
    main()
