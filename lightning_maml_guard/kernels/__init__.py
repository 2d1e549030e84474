"""Optional kernels for the CPU, each tested against torch's own layers.

- ``norm_block``: batch norm, ReLU and 2x2 pooling as one operation, also on other devices and under ``vmap``.
- ``first_block``: the first block of a network for images with one channel, from patches.
- ``channels_last``: convolutions in channels-last layout.
- ``batched_stack``: linear layers, activations and layer norms of several tasks at once.
- ``shared_weights``: the inner loop of such a network without weights of each task's own.
- ``allocator``: memory kept between training steps (glibc).

They are on by default. The environment variable ``LMG_KERNELS=0`` (or ``off``) switches all of them off: networks then
run their layers one after another, vmap runs the tasks, and the allocator is left alone. It is read once, when this
package is imported.
"""

from __future__ import annotations

import os


def _from_environment(value: str | None) -> bool:
    word = (value or "on").strip().lower()
    if word in {"0", "off"}:
        return False
    if word in {"1", "on"}:
        return True
    raise ValueError(
        f"Expected environment variable `LMG_KERNELS` to be 0, off, 1 or on but got {value!r}. Set one of them, or "
        "unset it for on."
    )


# Not read at each call: torch.compile cannot trace the environment.
_ENABLED = _from_environment(os.environ.get("LMG_KERNELS"))


def kernels_enabled() -> bool:
    """Return True unless ``LMG_KERNELS`` switched the kernels off."""
    return _ENABLED
