"""Strategies chosen before on this machine, kept in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path

import torch
from torch.utils._pytree import tree_leaves

from lightning_maml_guard.kernels.allocator import held
from lightning_maml_guard.maml.problem import MetaProblem
from lightning_maml_guard.utils.io import user_cache
from lightning_maml_guard.utils.task_map import Strategy


def signature(problem: MetaProblem, label: str) -> str:
    """Name what the choice depends on: machine, torch, memory, shapes, and how MAML is configured.

    Args:
        problem: The problem.
        label: Names the network and the code around it.

    Returns:
        A short hexadecimal number.
    """
    tensors = [*problem.params.values(), *tree_leaves(problem.support), *tree_leaves(problem.query)]
    device = tensors[0].device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    facts = [torch.__version__, str(device.type), name, torch.get_num_threads(), label, problem.order]
    facts += [held(), problem.inner_steps, problem.uniform, [[str(each.dtype), *each.shape] for each in tensors]]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]


def remembered(key: str) -> Strategy | None:
    """Look a choice up that was made on this machine before.

    Args:
        key: The signature.

    Returns:
        The strategy; None if there is none.
    """
    try:
        found = json.loads(_file().read_text()).get(key)
    except (OSError, RuntimeError, ValueError, AttributeError):  # no file or no home, or damaged: decided anew
        return None
    if isinstance(found, str):
        return found if found in {"loop", "all"} else None
    return found if type(found) is int and found > 0 else None


def remember(key: str, strategy: Strategy) -> None:
    """Write a choice down, so that the next run with this signature is the same to the last bit.

    Args:
        key: The signature.
        strategy: The choice.
    """
    try:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            known = json.loads(path.read_text())
        except (OSError, ValueError):
            known = {}
        handle, temporary = tempfile.mkstemp(suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "w") as file:
                json.dump({**(known if isinstance(known, dict) else {}), key: strategy}, file, indent=0)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)  # gone, unless something failed
    except (OSError, RuntimeError):  # nowhere to write: the next run tries again
        return


def _file() -> Path:
    return user_cache() / "vectorize.json"
