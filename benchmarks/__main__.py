"""Lists the benchmarks: ``python -m benchmarks``."""

from __future__ import annotations

import ast
from pathlib import Path

HERE = Path(__file__).parent


def commands() -> dict[str, str]:
    """Modules that run as commands, with the first sentence of their docstrings."""
    found = {}
    for path in sorted([*HERE.glob("*.py"), *HERE.glob("*/__main__.py")]):
        if path.name == "__init__.py" or path == Path(__file__):
            continue
        folder = path.name == "__main__.py"
        text = ast.get_docstring(ast.parse((path.with_name("__init__.py") if folder else path).read_text())) or ""
        found[path.parent.name if folder else path.stem] = text.partition(":")[0]
    return found


def main() -> None:
    """Print them."""
    print("Run one: python -m benchmarks.NAME. Its options: python -m benchmarks.NAME --help.")
    print("What they need comes with the extra: pip install -e '.[bench]'. Results: docs/benchmarks.md.")
    print(
        "It brings a torchvision that nothing here needs and that breaks Lightning beside a CPU build of torch: there,\n"
        "pip uninstall torchvision.\n"
    )
    for name, sentence in commands().items():
        print(f"  {name:17s} {sentence}")


if __name__ == "__main__":
    main()
