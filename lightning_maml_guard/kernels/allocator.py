"""Memory that a training on the CPU keeps between its steps.

glibc gives a freed piece of more than 32 MB back to the system at once, and smaller ones at the heap's end soon; the
next step has each of their pages mapped and zeroed anew. A convolutional network's activations are such pieces: on two
CPU cores a third of a miniImageNet step went there. Memory that stays can also be had in pages of 2 MiB, whose
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

# <malloc.h>
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_HELD = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 2**26}
# What glibc's own adaptation comes to once a piece of 32 MB was freed; its defaults where it does not adapt.
_RELEASED = {_MMAP_MAX: 65536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26, _TOP_PAD: 2**17}
# <sys/mman.h>; a page of the larger kind
_HUGEPAGE, _COLLAPSE, _HUGE = 14, 25, 2**21
_CHOSEN = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")

_holders: weakref.WeakSet[Any] = weakref.WeakSet()


def hold(holder: Any) -> bool:
    """Keep what is freed in the process, for as long as somebody holds it.

    Args:
        holder: Who holds it; one that is gone holds nothing.

    Returns:
        Whether that is possible: under glibc, unless the user chose settings or an allocator through the environment.
    """
    library = _glibc()
    if library is None or _user_chose():
        return False
    _set(library, _HELD)
    _holders.add(holder)
    return True


def release(holder: Any) -> None:
    """Let go, and give the free memory back to the system if nobody else holds it.

    Args:
        holder: Who held it.
    """
    if holder not in _holders:
        return
    _holders.discard(holder)
    library = _glibc()
    if library is not None and not held():
        _set(library, _RELEASED)
        library.malloc_trim(0)


def trim() -> None:
    """Give the free memory back to the system, once: after something larger than what is to come."""
    library = _glibc()
    if library is not None and held():
        library.malloc_trim(0)


def settle() -> None:
    """Ask Linux for huge pages under the memory that is held: once it has grown to what a step needs."""
    library = _glibc()
    if library is None or not held():
        return
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            begin, end = (int(each, 16) for each in line.split()[0].split("-"))
            begin, end = -(-begin // _HUGE) * _HUGE, end // _HUGE * _HUGE
            # Advice, which a kernel may not know or take: nothing hangs on what these return.
            for advice in (_HUGEPAGE, _COLLAPSE) if begin < end else ():
                library.madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), advice)


def held() -> bool:
    """Say whether freed memory is kept.

    Returns:
        Whether somebody holds it.
    """
    return bool(_holders)


def _set(library: ctypes.CDLL, options: dict[int, int]) -> None:
    for option, value in options.items():
        library.mallopt(option, value)


def _user_chose() -> bool:
    return any(os.environ.get(name) for name in _CHOSEN) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")


@cache
def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
