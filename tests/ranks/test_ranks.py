import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import nn

from lightning_maml_guard import ConvergenceGuard, CurvatureOptions, MetaProblem, measure
from lightning_maml_guard.stability.hvp import MeasurementCache
from lightning_maml_guard.utils.distributed import ProcessGroup, SharedError
from lightning_maml_guard.utils.lightning_compat import MisconfigurationException, check_strategy
from tests.helpers import fit, grouped_measure, leave_group, linear_module, quadratic_batch
from tests.ranks.program import CASES, STEPS, Module, episodes, part, train

ROOT = Path(__file__).parents[2]
# With tasks="worst" a run over several tasks' blocks ends when all of theirs have: the largest eigenvalue is as exact as
# was asked for, but how far the smallest Ritz value got depends on which tasks a process holds.
NUMBERS = ("lambda_max", "lambda_min", "alpha_c", "beta_c", "exact_beta_c", "beta_c_noise", "predicted_change")


def converged(options: dict) -> tuple[str, ...]:
    return tuple(n for n in NUMBERS if n != "lambda_min" or options.get("tasks") != "worst")


def launched(folder: Path, case: str, launcher: str) -> list[dict]:
    if launcher == "single":
        train(folder, case, devices=1)
        return [torch.load(folder / "rank0.pt", weights_only=True)]
    if launcher == "torchrun":
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "tests.ranks.program"]
        done = subprocess.run(
            [sys.executable, *command, str(folder), case],
            cwd=ROOT, capture_output=True, text=True, timeout=240,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    else:
        train(folder, case, strategy="ddp_spawn", devices=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def timeless(found: dict) -> dict:
    state = {key: value for key, value in found["guard"].items() if key != "announced"}
    return {**state, "history": [{k: v for k, v in each.items() if k != "seconds"} for each in state["history"]]}


def same(one, other) -> bool:
    """Equal, NaN included."""
    return repr(one) == repr(other)


@pytest.mark.parametrize("case", ["log", pytest.param("simplified", marks=pytest.mark.slow)])
def test_two_processes_measure_what_one_does_on_all_tasks(tmp_path, case):
    torch.set_num_threads(1)
    (alone,) = launched(tmp_path, case, "single")
    together = launched(tmp_path, case, "ddp_spawn")
    assert len(alone["guard"]["history"]) == STEPS // 6
    for found in together:
        for mine, theirs in zip(alone["guard"]["history"], found["guard"]["history"], strict=True):
            assert mine["status"] == theirs["status"]
            for name in converged(CASES[case][0]):
                assert theirs[name] == pytest.approx(mine[name], rel=1e-5, nan_ok=True), name
            # At step 0 nobody knows yet that every step has this batch: each process draws from its own tasks.
            if mine["step"] > 0:
                assert mine["severity"] == pytest.approx(theirs["severity"], rel=1e-5, abs=1e-8)
            assert math.isfinite(theirs["severity"])
    assert same(timeless(together[0]), timeless(together[1]))


@pytest.mark.parametrize(
    ("case", "launcher"),
    [("rescale", "torchrun"), ("rollback", "ddp_spawn")],
)
@pytest.mark.slow
def test_replicas_stay_bitwise_equal_under_rescale(tmp_path, case, launcher):
    ranks = launched(tmp_path, case, launcher)
    assert ranks[0]["guard"]["caps"]["beta"] < 3.0
    assert same(timeless(ranks[0]), timeless(ranks[1]))
    for name, value in ranks[0]["weights"].items():
        assert torch.equal(value, ranks[1]["weights"][name]) and bool(torch.isfinite(value).all()), name
    assert ranks[0]["said"] and not ranks[1]["said"]  # warnings come from rank zero


def test_a_failure_on_one_rank_leaves_no_other_waiting(tmp_path):
    ranks = launched(tmp_path, "failing", "torchrun")
    assert [each["steps"] for each in ranks] == [STEPS, STEPS]
    assert [report["step"] for report in ranks[0]["guard"]["history"]] == [0, 12, 18]
    assert same(timeless(ranks[0]), timeless(ranks[1]))
    (said,) = [each for each in ranks[0]["said"] if "the check at step" in each]
    assert "step 6" in said and "on rank 1: OSError: the disk of rank 1 is full" in said
    assert all(torch.equal(value, ranks[1]["weights"][name]) for name, value in ranks[0]["weights"].items())


def _problem(batch, fails: bool = False) -> MetaProblem:
    module = Module(0.05)

    def task_loss(params, data):
        if fails:
            raise MemoryError("no room")
        return module.task_loss(params, data)

    return MetaProblem(module.theta(), task_loss, batch.support, batch.query, inner_lr=0.05)


def _measured(rank: int, folder: str, options: dict, failing: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    cache = MeasurementCache(ranks=ProcessGroup())
    try:
        with cache.ranks.fail_together():
            report = measure(
                _problem(part(episodes(), rank, 2), rank == failing),
                **grouped_measure(beta=0.05, cache=cache, **options),
            )
            found = {name: getattr(report, name) for name in (*NUMBERS, "hvps")}
    except SharedError as error:
        found = str(error)
    torch.save(found, f"{folder}/measured{rank}.pt")
    leave_group()


OPTIONS = [
    pytest.param({"criterion": "simplified"}, marks=pytest.mark.slow),
    {"criterion": "exact", "data": "both"},
    {"criterion": "exact", "tasks": "worst"},
    pytest.param({"criterion": "simplified", "tasks": "worst", "data": "query"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_measure_over_ranks_is_measure_over_all_tasks(tmp_path, options):
    processes.spawn(_measured, (str(tmp_path), options, -1), nprocs=2)
    alone = measure(_problem(episodes()), **grouped_measure(beta=0.05, **options))
    for rank in range(2):
        found = torch.load(tmp_path / f"measured{rank}.pt", weights_only=True)
        for name in converged(options):
            assert found[name] == pytest.approx(getattr(alone, name), rel=1e-5, nan_ok=True), name


@pytest.mark.parametrize("criterion", ["simplified", "exact"])
def test_measure_fails_on_all_ranks_when_it_fails_on_one(tmp_path, criterion):
    processes.spawn(_measured, (str(tmp_path), {"criterion": criterion}, 1), nprocs=2)
    told = [torch.load(tmp_path / f"measured{rank}.pt", weights_only=True) for rank in range(2)]
    assert told == ["on rank 1: MemoryError: no room"] * 2


class _Strategy:
    root_device = torch.device("cpu")


class FSDPStrategy(_Strategy):
    pass


class _Trainer:
    strategy, world_size = FSDPStrategy(), 2


def test_a_strategy_that_splits_the_module_is_refused_until_it_is_asked_for():
    with pytest.raises(
        MisconfigurationException, match=r"not tested with FSDPStrategy.*strategy='ddp'.*allow_untested"
    ):
        check_strategy(_Trainer(), False)
    check_strategy(_Trainer(), True)


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_the_strategies_of_lightning_that_split_a_module_are_refused_in_setup(name):
    import pytorch_lightning.strategies as strategies

    guard = ConvergenceGuard()

    class Trainer(_Trainer):
        strategy = object.__new__(getattr(strategies, name))
        world_size, barebones = 1, False

    with pytest.raises(MisconfigurationException, match=f"not tested with {name}"):
        guard.setup(Trainer(), Module(0.1), "fit")


def test_pyhessian_is_refused_over_several_processes():
    with pytest.raises(MisconfigurationException, match=r"estimator='pyhessian'\) measures one process's loss, but 2"):
        ConvergenceGuard(curvature=CurvatureOptions(estimator="pyhessian")).setup(
            _Trainer(), nn.Linear(1, 1), "validate"
        ) or ConvergenceGuard(curvature=CurvatureOptions(estimator="pyhessian")).setup(_Trainer(), Module(0.1), "fit")


def test_history_keeps_the_latest_checks():
    guard = ConvergenceGuard(every_n_steps=1, action="log", history_size=3)
    fit(linear_module(2, 0.1, inner_lr=0.05), quadratic_batch([1.0, 2.0]), 8, [guard])
    assert [report.step for report in guard.history] == [5, 6, 7]
    assert [step for step, _ in guard.severities] == [5, 6, 7]


def _measured_with_nan(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    cache = MeasurementCache(ranks=ProcessGroup())
    batch = part(episodes(), rank, 2)
    if rank == 1:
        batch.support[1][0, 0] = torch.nan
    with cache.ranks.fail_together():
        report = measure(
            _problem(batch), beta=0.05, cache=cache, curvature=CurvatureOptions(criterion="simplified", tasks="worst")
        )
    torch.save([report.status, *report.reasons], f"{folder}/measured{rank}.pt")
    leave_group()


def test_a_loss_that_is_not_finite_on_one_rank_ends_the_measurement_on_all(tmp_path):
    processes.spawn(_measured_with_nan, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        status, reason = torch.load(tmp_path / f"measured{rank}.pt", weights_only=True)
        assert status == "unresolved" and "nan" in reason
