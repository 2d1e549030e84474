"""Keeps freed memory in the process between the steps of a training on the CPU.

glibc returns a freed piece of more than 32 MB to the system at once, and smaller ones at the end of the heap soon; the
next step then maps and zeroes each of their pages again. The activations of a convolutional network are such pieces: on
two CPU cores this took a third of a miniImageNet step. Memory that is kept can also lie in pages of 2 MiB, whose
addresses the processor finds sooner.
"""

from __future__ import annotations

import ctypes
import os
import platform
import weakref
from functools import cache
from pathlib import Path
from typing import Any

from lightning_maml_guard.kernels import kernels_enabled

# <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_HELD = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**26}
# glibc's own values after it has adapted to a freed piece of 32 MB; its defaults where it does not adapt.
_RELEASED = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26, _TOP_PAD: 2**17}
# <sys/mman.h>; bytes of a huge page
_HUGEPAGE, _COLLAPSE, _HUGE = 14, 25, 2**21
_CHOSEN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")

_holders: weakref.WeakSet[Any] = weakref.WeakSet()


def hold(holder: Any) -> bool:
    """Keep freed memory in the process until ``holder`` releases it or is collected.

    Returns False, and does nothing, without glibc, if the user chose an allocator or its settings through the
    environment, or if the kernels are switched off.
    """
    library = _glibc()
    if library is None or _user_chose() or not kernels_enabled():
        return False
    _set(library, _HELD)
    _holders.add(holder)
    return True


def release(holder: Any) -> None:
    """Return the free memory to the system if ``holder`` was the last holder."""
    if holder not in _holders:
        return
    _holders.discard(holder)
    library = _glibc()
    if library is not None and not held():
        _set(library, _RELEASED)
        library.malloc_trim(0)


def settle() -> None:
    """Ask Linux for huge pages under the heap; to be called when it has grown to what a step needs."""
    library = _glibc()
    if library is None or not held():
        return
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            begin, end = (int(each, 16) for each in line.split()[0].split("-"))
            begin, end = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
            # Only advice, which a Linux may not know or follow: the return values do not matter.
            for advice in (_HUGEPAGE, _COLLAPSE) if begin < end else ():
                library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def held() -> bool:
    """Return True if freed memory is kept."""
    return bool(_holders)


def _set(library: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        library.mallopt(option, value)


def _user_chose() -> bool:
    return any(os.environ.get(name) for name in _CHOSEN) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
