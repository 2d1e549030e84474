import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightning_maml_guard import MetaLearningModule
from lightning_maml_guard.kernels.allocator import held, hold, release, settle
from lightning_maml_guard.networks import mlp
from tests.helpers import fit

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone has the settings")
SMAPS, HUGE_PAGES = Path("/proc/self/smaps"), Path("/sys/kernel/mm/transparent_hugepage/enabled")
BATCH = ((torch.randn(4, 5, 1),) * 2,) * 2
SIZE = 2**26  # bytes: beyond what glibc ever keeps by itself
# In a process of its own, whose heap nothing has used: pages mapped anew when a piece like one just freed is written.
PROGRAM = """
import ctypes, resource
from lightning_maml_guard.kernels.allocator import hold, release

class Holder: pass

library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
library.free.argtypes = [ctypes.c_void_p]
library.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]

def write():
    piece = library.malloc({size})
    library.memset(piece, 1, {size})
    library.free(piece)

def faults():
    write()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    write()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

holder = Holder()
print(faults())
hold(holder)
print(faults(), resident())
release(holder)
print(resident(), faults())
"""


class Holder:
    """Somebody who holds memory."""


def test_what_is_freed_is_used_again_while_held_and_given_back_at_the_end():
    run = subprocess.run([sys.executable, "-c", PROGRAM.format(size=SIZE)], capture_output=True, text=True, check=True)
    before, during, kept, left, after = map(int, run.stdout.split())
    assert min(before, after) > 20  # 16,384 pages, or 32 huge ones
    assert during < min(before, after) / 4
    assert kept - left > 0.9 * SIZE


def test_a_fit_asks_for_huge_pages_once_it_has_its_size(monkeypatch):
    at = []
    module = MetaLearningModule(mlp())
    monkeypatch.setattr("lightning_maml_guard.maml.kept_memory.settle", lambda: at.append(module.trainer.global_step))
    fit(module, BATCH, steps=5)
    fit(module, BATCH, steps=1)
    assert at == [2]


def test_what_is_held_lies_in_huge_pages_and_keeps_what_it_held():
    holder = Holder()
    settle()  # nobody holds anything: nothing happens
    assert hold(holder)
    values = torch.arange(SIZE // 4, dtype=torch.int32)
    settle()
    heap = [part.partition("VmFlags:")[2].splitlines()[0] for part in SMAPS.read_text().split("[heap]")[1:]]
    release(holder)
    assert torch.equal(values, torch.arange(SIZE // 4, dtype=torch.int32))
    assert any(" hg " in flags for flags in heap) or not HUGE_PAGES.exists()


def test_the_last_holder_lets_go_and_one_that_is_gone_holds_nothing():
    first, second = Holder(), Holder()
    hold(first), hold(second)
    release(first)
    assert held()
    del second
    assert not held()
    release(first)


def test_a_fit_on_the_cpu_keeps_memory_unless_told_not_to():
    seen = []

    class Module(MetaLearningModule):
        def on_train_batch_start(self, batch, batch_idx):
            seen.append(held())

    for options in ({}, {"keep_memory": False}):
        fit(Module(mlp(), **options), BATCH, steps=2)
        assert not held()
    assert seen == [True, True, False, False]


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_own_settings_go_first(monkeypatch, name):
    monkeypatch.setenv(name, "glibc.malloc.mmap_threshold=1048576" if name == "GLIBC_TUNABLES" else "1048576")
    holder = Holder()
    assert not hold(holder)
    assert not held()


def test_without_glibc_nothing_happens(monkeypatch):
    monkeypatch.setattr("lightning_maml_guard.kernels.allocator._glibc", lambda: None)
    assert not hold(Holder())
    assert not held()
