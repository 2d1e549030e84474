"""Train MAML with or without the guard: ``python examples/train.py [task] [--guard [action]] [options]``."""

from lightning_maml_guard.cli.main import main

if __name__ == "__main__":
    main()
