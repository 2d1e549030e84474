"""Results kept on disk: each depends on its key alone."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Kept:
    """Results by key; what they depend on, torch's version included, is the caller's to put into it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, compute: Callable[[], Any]) -> Any:
        """Return what is kept under a key, or compute and keep it (plain data)."""
        name = hashlib.sha1(key.encode()).hexdigest()[:20]
        path = self.folder / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
        found = compute()
        written = path.with_suffix(f".{os.getpid()}")
        written.write_text(json.dumps(found))
        written.replace(path)
        return found
