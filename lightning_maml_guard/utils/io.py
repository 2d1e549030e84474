"""Where the package keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path


def user_cache() -> Path:
    """Name the user's cache folder of this package; it need not exist.

    Returns:
        ``$XDG_CACHE_HOME/lightning_maml_guard``, by default in ``~/.cache``.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_maml_guard"
