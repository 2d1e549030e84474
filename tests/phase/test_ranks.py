"""A grid over two processes is the grid of one."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from lightning_maml_guard import phase_diagram
from lightning_maml_guard.utils.distributed import SharedError
from tests.helpers import leave_group
from tests.phase.families import KINDS, family

ARRAYS = ("losses", "start", "unadapted", "final", "divergence_step", "alpha_c", "beta_c", "exact_beta_c")
CHUNKS = (3, None)


def _diagram(family, chunk_size):
    return phase_diagram(
        family,
        [0.01, 0.05, 0.1],
        [0.005, 0.02, 0.05],
        6,
        measure_every=3,
        max_iter=6,
        chunk_size=chunk_size,
        progress=False,
    )


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    problems = family(KINDS["sinusoid"])
    drawn = []

    def counted(step):
        drawn.append(step)
        return problems(step)

    def failing(step):
        if rank == 1 and step == 2:
            raise OSError("the disk of rank 1 is full")
        return problems(step)

    found = {}
    for chunk_size in CHUNKS:
        drawn.clear()
        diagram = _diagram(counted, chunk_size)
        found[chunk_size] = {name: torch.from_numpy(getattr(diagram, name)) for name in ARRAYS} | {"drawn": len(drawn)}
    try:
        _diagram(failing, 3)
    except SharedError as error:
        found["told"] = str(error)
    torch.save(found, f"{folder}/{rank}.pt")
    leave_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    processes.spawn(_one_of_two, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_two_processes_share_the_grid_and_both_return_all_of_it(ranks, chunk_size):
    torch.set_num_threads(1)
    alone = _diagram(family(KINDS["sinusoid"]), chunk_size)
    torch.set_num_threads(2)
    for name in ARRAYS:
        one, other = (each[chunk_size][name].numpy() for each in ranks)
        assert np.array_equal(one, other, equal_nan=True), name
        if chunk_size:  # else the parts differ, and with them the rounding of batched products
            assert np.array_equal(one, getattr(alone, name), equal_nan=True), name
        assert np.allclose(one, getattr(alone, name), rtol=1e-9, equal_nan=True), name


def test_neither_trains_what_the_other_does(ranks):
    """Of three chunks one rank trains two and the other one."""
    assert ranks[0][3]["drawn"] - ranks[1][3]["drawn"] == 6 + 2  # its steps, its start and the end's measurement


def test_a_failure_of_one_is_told_by_both(ranks):
    assert [each["told"] for each in ranks] == ["on rank 1: OSError: the disk of rank 1 is full"] * 2
