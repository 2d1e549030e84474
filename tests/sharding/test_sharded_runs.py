"""One model in pieces on two and three processes: the numbers of one process, on all of them alike."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.sharding.program import SPLITS_ON_CPUS, train

pytestmark = pytest.mark.skipif(not SPLITS_ON_CPUS, reason="this torch splits no model on CPUs")
ROOT = Path(__file__).parents[2]
NUMBERS = ("lambda_max", "lambda_min", "alpha_c", "beta_c", "exact_beta_c", "beta_c_noise", "mean_alpha_c")
NUMBERS += ("sgd_beta_c", "predicted_change", "severity", "adaptation_gain")
QUICK = ("plain", "maml")
SLOW = ("adam", "accumulated", "first", "simplified", "steps", "worst", "stated", "validated", "rescale", "rolled_back")
SLOW += ("rescale_maml",)


# Of an update whose Jacobian J is not symmetric a process alone multiplies with the transpose: the eigenvalues are the
# same, but a run that stops early knows them from another space, and the tasks' curvatures are along another vector.
NOT_SYMMETRIC = ("first", "simplified", "stated")


def started(folder: Path, size: int, cases: tuple[str, ...]) -> list[subprocess.Popen]:
    """Start a process for each piece, as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    processes = []
    for rank in range(size):
        own = {name: str(value) for name, value in (common | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        command = [sys.executable, "-m", "tests.sharding.program", str(folder), *cases]
        log = (folder / f"log{rank}").open("w")
        processes.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **own}, stdout=log, stderr=log))
    return processes


def run(folder: Path, size: int, cases: tuple[str, ...], seconds: float = 1200) -> None:
    processes = started(folder, size, cases)
    try:
        codes = [each.wait(seconds) for each in processes]
    finally:
        for each in processes:
            each.kill()
    assert codes == [0] * size, (folder / "log0").read_text()[-3000:]


def found(folder: Path, case: str, size: int) -> list[dict]:
    return [torch.load(folder / f"{case}-{size}-{rank}.pt", weights_only=True) for rank in range(size)]


def shared(state: dict) -> dict:
    """What of a guard's state must be the same on all processes: all but seconds, and warnings said by torch."""
    rest = {key: value for key, value in state.items() if key != "announced"}
    return {**rest, "history": [{k: v for k, v in each.items() if k != "seconds"} for each in state["history"]]}


def check_against_one_process(folder: Path, case: str, size: int) -> None:
    alone, ranks = train(folder, case, 0, 1), found(folder, case, size)
    history = alone["guard"]["history"]
    assert history and len(history) == len(ranks[0]["guard"]["history"])
    for mine, theirs in zip(history, ranks[0]["guard"]["history"], strict=True):
        assert (mine["step"], mine["status"]) == (theirs["step"], theirs["status"])
        for name in NUMBERS:
            near = 0.02 if case in NOT_SYMMETRIC and "beta_c" in name else 1e-5
            assert theirs[name] == pytest.approx(mine[name], rel=near, abs=1e-9, nan_ok=True), name
    for rank in ranks:
        assert rank["steps"] == alone["steps"] and repr(shared(rank["guard"])) == repr(shared(ranks[0]["guard"]))
        for name, value in alone["weights"].items():
            assert torch.equal(rank["weights"][name], ranks[0]["weights"][name])
            assert torch.allclose(rank["weights"][name], value, rtol=1e-5, atol=1e-8), name
    said = [" ".join(text.split()) for text in ranks[0]["said"] if "ConvergenceGuard" in text]
    assert not [text for text in said if "failed" in text or "could not" in text], said


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run(folder, 2, QUICK)
    return folder


@pytest.mark.parametrize("case", QUICK)
def test_two_processes_with_one_model_measure_and_train_as_one_process_does(quick, case):
    check_against_one_process(quick, case, 2)


@pytest.fixture(scope="module", params=[2, 3])
def slow(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    run(folder, request.param, (*SLOW, "resumed"))
    return folder, request.param


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_two_and_three_processes_do_what_one_does(slow, case):
    folder, size = slow
    check_against_one_process(folder, case, size)


@pytest.mark.slow
def test_rescale_lowers_and_rolls_back_on_all_processes_alike(slow):
    folder, size = slow
    ranks = found(folder, "rescale", size)
    caps = [rank["guard"]["caps"]["beta"] for rank in ranks]
    assert caps[0] < 40.0 and caps == [caps[0]] * size
    rolled = found(folder, "rolled_back", size)
    assert [rank["guard"]["rollbacks"] for rank in rolled] == [rolled[0]["guard"]["rollbacks"]] * size
    assert rolled[0]["guard"]["rollbacks"] > 0
    for rank in (*ranks, *rolled):
        assert all(bool(torch.isfinite(value).all()) for value in rank["weights"].values())


@pytest.mark.slow
def test_a_run_goes_on_from_a_distributed_checkpoint(slow):
    folder, size = slow
    whole, resumed = found(folder, "rescale", size), found(folder, "resumed", size)
    assert (folder / "resumed.ckpt").is_dir()
    for one, other in zip(whole, resumed, strict=True):
        assert other["steps"] == one["steps"] and other["guard"]["caps"]["beta"] is not None
        steps = [[report["step"] for report in each["guard"]["history"]] for each in (one, other)]
        assert steps[0] == steps[1]
        assert repr(shared(other["guard"])) == repr(shared(resumed[0]["guard"]))


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_job(tmp_path):
    processes = started(tmp_path, 2, ("killed",))
    try:
        assert processes[1].wait(300) == -signal.SIGKILL
        assert processes[0].wait(120) != 0  # long before the process group's timeout of half an hour
    finally:
        for each in processes:
            each.kill()
    assert not (tmp_path / "killed-2-0.pt").exists()
