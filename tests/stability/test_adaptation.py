"""Losses before and after adaptation, beside inner loops written out by hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_maml_guard import MetaProblem
from lightning_maml_guard.maml import inner_updates
from lightning_maml_guard.networks import conv4
from lightning_maml_guard.stability.adaptation import Adaptation, adaptation
from lightning_maml_guard.stability.problems import AccumulatedProblem, PlainProblem
from lightning_maml_guard.utils.double_backward import double_backward
from lightning_maml_guard.utils.isolation import isolated
from lightning_maml_guard.utils.task_map import TaskMap


def loss_of(net, criterion=F.mse_loss):
    return lambda params, data: criterion(functional_call(net, params, (data[0],)), data[1])


def problem_of(net, support, query, *args, criterion=F.mse_loss, **kwargs):
    return MetaProblem(dict(net.named_parameters()), loss_of(net, criterion), support, query, *args, **kwargs)


def by_hand(net, support, query, move, steps, criterion=F.mse_loss):
    """Query losses before and after, and support losses of every step, of every task; ``move`` gives a step."""
    found = []
    for (x, y), (q, z) in zip(support, query, strict=True):
        params = {name: value.detach().clone().requires_grad_() for name, value in net.named_parameters()}
        memory, rows = {}, []
        for k in range(steps + 1):
            own = criterion(functional_call(net, params, (x,)), y)
            rows.append((float(criterion(functional_call(net, params, (q,)), z).detach()), float(own.detach())))
            grads = torch.autograd.grad(own, list(params.values()))
            with torch.no_grad():
                for (name, value), grad in zip(params.items(), grads, strict=True):
                    value -= move(k, name, grad, memory)
        found.append(rows)
    queries, supports = torch.tensor(found, dtype=torch.float64).unbind(-1)
    return queries[:, [0, -1]], supports


def momentum(rate, m=0.9):
    def move(k, name, grad, memory):
        memory[name] = grad if k == 0 else m * memory[name] + grad
        return rate * memory[name]

    return move


def adam(rate):
    def move(k, name, grad, memory):
        first, second = memory.get(name, (0.0, 0.0))
        first, second = memory[name] = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad * grad
        return rate * first / (1 - 0.9 ** (k + 1)) / ((second / (1 - 0.999 ** (k + 1))).sqrt() + 1e-8)

    return move


def slowing(params, grads, state):
    """An update of a user's own, with a state of tensors and a count: the k-th step is divided by k."""
    count = 1 if state is None else state[1] + 1
    total = {n: g if state is None else state[0][n] + g for n, g in grads.items()}
    return {n: value - total[n] / count for n, value in params.items()}, (total, count)


def mean_gradient(rate):
    def move(k, name, grad, memory):
        memory[name] = memory.get(name, 0.0) + grad
        return rate * memory[name] / (k + 1)

    return move


def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def regression(tasks=4, shots=(6,), width=2):
    g = torch.Generator().manual_seed(1)

    def drawn(n):
        x = torch.randn(n, width, dtype=torch.float64, generator=g)
        return x, torch.randn(n, 1, dtype=torch.float64, generator=g)

    return [drawn(shots[i % len(shots)]) for i in range(tasks)], [drawn(7) for _ in range(tasks)]


def stacked(sets):
    return tuple(torch.stack(each) for each in zip(*sets, strict=True))


_HALF = {"0.weight": torch.tensor(0.2).double(), "2.weight": torch.linspace(0.1, 0.5, 5).double().view(1, 5)}
_STEPS = torch.tensor([0.3, 0.2, 0.05]).double()
_BOTH = {"0.bias": _STEPS, "2.weight": torch.rand(3, 1, 5, generator=torch.Generator().manual_seed(2)).double()}
CASES = {
    "one step": ((0.1, 1), {}, lambda k, name, grad, memory: 0.1 * grad),
    "three steps": ((0.1, 3), {}, lambda k, name, grad, memory: 0.1 * grad),
    "first order": ((0.1, 3), {"order": "first"}, lambda k, name, grad, memory: 0.1 * grad),
    "simplified": ((0.1, 2), {"order": "simplified"}, lambda k, name, grad, memory: 0.1 * grad),
    "rates by parameter": ((_HALF, 3), {}, lambda k, name, grad, memory: _HALF.get(name, 0.0) * grad),
    "rates by step": ((_STEPS, 3), {}, lambda k, name, grad, memory: (*_STEPS, 0.0)[k] * grad),
    "by step and parameter": (
        (_BOTH, 3),
        {},
        lambda k, name, grad, memory: _BOTH[name][k] * grad if name in _BOTH and k < 3 else 0.0,
    ),
    "momentum": ((0.1, 3), {"inner_update": inner_updates.Momentum(0.9)}, momentum(0.1)),
    "adam": ((0.05, 4), {"inner_update": inner_updates.Adam()}, adam(0.05)),
    "one's own": ((0.1, 3), {"inner_update": slowing}, mean_gradient(0.1)),
}
MAPS = {"vmapped": TaskMap(strict=True), "chunked": TaskMap(3, strict=True), "looped": TaskMap(looped=True)}


@pytest.mark.parametrize("way", MAPS)
@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_an_inner_loop_by_hand(case, way):
    arguments, options, move = CASES[case]
    net, (support, query) = network(), regression()
    found = adaptation(problem_of(net, stacked(support), stacked(query), *arguments, **options), MAPS[way])
    queries, supports = by_hand(net, support, query, move, arguments[1])
    torch.testing.assert_close(found.query, queries, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.support, supports, rtol=1e-10, atol=0)
    assert found.before == pytest.approx(float(queries[:, 0].mean()))
    assert found.after == pytest.approx(float(queries[:, -1].mean()))
    assert found.gain == pytest.approx(math.log(queries[:, 0].mean() / queries[:, -1].mean()))
    assert found.query_losses == pytest.approx(queries.mean(0).tolist())
    assert found.support_losses == pytest.approx(supports.mean(0).tolist())


@pytest.mark.parametrize("case", CASES)
def test_a_factor_scales_every_rate(case):
    arguments, options, move = CASES[case]
    net, (support, query) = network(), regression()
    problem = problem_of(net, stacked(support), stacked(query), *arguments, **options)
    found = adaptation(problem.at_factor(0.25), TaskMap())
    queries, supports = by_hand(net, support, query, lambda *each: 0.25 * move(*each), arguments[1])
    torch.testing.assert_close(found.query, queries, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.support, supports, rtol=1e-10, atol=0)


def test_tasks_of_different_sizes():
    net, (support, query) = network(), regression(shots=(3, 8, 5))
    found = adaptation(problem_of(net, support, query, 0.1, 3), TaskMap())
    queries, supports = by_hand(net, support, query, lambda k, name, grad, memory: 0.1 * grad, 3)
    torch.testing.assert_close(found.query, queries, rtol=1e-10, atol=0)
    torch.testing.assert_close(found.support, supports, rtol=1e-10, atol=0)


def test_classification():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)).double()
    g = torch.Generator().manual_seed(0)
    sets = [[(torch.randn(12, 3, generator=g).double(), torch.arange(12) % 4) for _ in range(5)] for _ in range(2)]
    found = adaptation(problem_of(net, *(stacked(each) for each in sets), 0.3, 2, criterion=F.cross_entropy), TaskMap())
    expected = by_hand(net, *sets, lambda k, name, grad, memory: 0.3 * grad, 2, F.cross_entropy)
    torch.testing.assert_close(found.query, expected[0], rtol=1e-10, atol=0)
    torch.testing.assert_close(found.support, expected[1], rtol=1e-10, atol=0)


@pytest.mark.parametrize("rate", [0.4, 0.99, 1.01, 1.5])
def test_linear_regression_has_a_closed_form(rate):
    """``e_k = (I - alpha*H)^k e_0``, and the support loss ``1/2 e.He``: it falls below ``2/lambda_max`` and rises above."""
    rng = np.random.default_rng(0)
    x, start, targets = rng.normal(size=(4, 9, 3)), rng.normal(size=3), rng.normal(size=(4, 3))
    # One task's own top direction decides in the end: start along it.
    hessians = [each.T @ each / 9 for each in x]
    tops = [np.linalg.eigh(each) for each in hessians]
    start_error = [vectors[:, -1] for _, vectors in tops]
    targets = np.stack([start - error for error in start_error])
    scale = np.sqrt([values[-1] for values, _ in tops])  # the same largest eigenvalue, 1, for all
    x = x / scale[:, None, None]
    y = np.einsum("tnd,td->tn", x, targets)
    data = torch.from_numpy(x), torch.from_numpy(y)
    problem = MetaProblem(
        {"w": torch.from_numpy(start)},
        lambda params, task: ((task[0] @ params["w"] - task[1]) ** 2).mean() / 2,
        data,
        data,
        2 * rate,
        4,
    )
    found = adaptation(problem, TaskMap())
    expected = [0.5 * (1 - 2 * rate) ** (2 * k) for k in range(5)]
    assert found.support_losses == pytest.approx(expected, rel=1e-9)
    assert found.gain == pytest.approx(-8 * math.log(abs(1 - 2 * rate)), abs=1e-9)
    # A rise of 17 % over the loop is no finding of the query loss, but four tasks agree to all digits.
    assert found.harmful == (rate > 1.1)
    assert found.diverges_at == (1 if rate > 1.1 else None)


def sinusoids(seed, tasks=4, shots=10):
    g = torch.Generator().manual_seed(seed)
    height, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1, generator=g), math.pi * torch.rand(tasks, 1, 1, generator=g)
    xs = [10 * torch.rand(tasks, shots, 1, generator=g) - 5 for _ in range(2)]
    return [(x, height * torch.sin(x - phase)) for x in xs]


def sinusoid_network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1))


@pytest.mark.parametrize("seed", range(5))
def test_an_inner_rate_that_blows_up_is_harmful(seed):
    problem = problem_of(sinusoid_network(seed), *sinusoids(seed), 0.5, 5)
    found = adaptation(problem, TaskMap())
    assert found.harmful and found.diverges_at in {1, 2, 3, 4, 5}
    assert found.gain < -3
    assert adaptation(problem.at_factor(2.0**-12), TaskMap()).after < found.before


def test_healthy_training_is_never_called_harmful():
    """Fresh networks and those that 100 steps by hand have trained: 20 seeds, K = 1, four tasks of ten shots."""
    for seed in range(20):
        net = sinusoid_network(seed)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        params = dict(net.named_parameters())
        for step in range(101):
            (x, y), (q, z) = sinusoids(1000 * seed + step)
            if step in {0, 1, 3, 10, 30, 100}:
                for steps in (1, 5):
                    found = adaptation(problem_of(net, (x, y), (q, z), 0.01, steps), TaskMap())
                    assert not found.harmful and found.diverges_at is None, (seed, step, found)
            total = 0.0
            for i in range(4):
                own = F.mse_loss(functional_call(net, params, (x[i],)), y[i])
                grads = torch.autograd.grad(own, list(params.values()), create_graph=True)
                fast = {name: v - 0.01 * g for (name, v), g in zip(params.items(), grads, strict=True)}
                total = total + F.mse_loss(functional_call(net, fast, (q[i],)), z[i]) / 4
            optimizer.zero_grad()
            total.backward()
            optimizer.step()


def power(query):
    """Support loss ``w``, whose gradient is 1, so that ``w_k = 1 - k*alpha``; the query loss is a function of it."""
    data = torch.zeros(3, 1), torch.ones(3, 1)
    return MetaProblem(
        {"w": torch.ones(())},
        lambda params, task: torch.where(task[0].sum() > 0, query(params["w"]), params["w"]) + 0 * task[0].sum(),
        *((each,) for each in data),
        0.75,
        2,
    )


def test_a_query_loss_that_is_lost_at_a_finite_support_loss():
    found = adaptation(power(torch.sqrt), TaskMap())
    assert found.support_losses == pytest.approx([1.0, 0.25, -0.5])
    assert found.before == pytest.approx(1.0) and math.isnan(found.after)
    assert found.harmful and found.gain == -math.inf and found.diverges_at is None
    infinite = adaptation(power(lambda w: torch.where(w > 0, w, math.inf)), TaskMap())
    assert infinite.after == math.inf and infinite.harmful and infinite.gain == -math.inf


def test_a_loss_that_was_lost_before_is_not_the_adaptations_fault():
    found = adaptation(power(lambda w: w * math.nan), TaskMap())
    assert not found.harmful and math.isnan(found.gain) and math.isnan(found.before)
    lost = problem_of(network(), *(stacked(each) for each in regression()), 0.1, 2)
    with torch.no_grad():
        lost.params["0.bias"][0] = math.inf
    lost = adaptation(lost, TaskMap())
    assert not lost.harmful and lost.diverges_at is None


def test_an_overflow_of_the_inner_loop_is_placed():
    problem = problem_of(sinusoid_network(0), *sinusoids(0), 1e9, 5)
    for task_map in MAPS.values():
        found = adaptation(problem, task_map)
        assert found.harmful and found.gain == -math.inf
        lost = [step for step, loss in enumerate(found.support_losses) if not math.isfinite(loss)]
        assert found.diverges_at == lost[0] > 0


def test_losses_below_zero():
    """A Gaussian's negative log-likelihood: its sign says nothing, its spread over the tasks does."""

    def likelihood(params, data):
        return (0.5 * (data[0] - params["mean"]) ** 2 * torch.exp(-2 * params["log_s"]) + params["log_s"]).mean()

    g = torch.Generator().manual_seed(0)
    draw = [(torch.randn(6, 1, generator=g) + 0.05 * torch.randn(6, 20, generator=g)).double()]
    params = {"mean": torch.zeros(1).double(), "log_s": torch.full((1,), -1.0).double()}
    problem = MetaProblem(params, likelihood, (draw[0],), (draw[0],), 0.02, 3)
    found = adaptation(problem, TaskMap())
    assert found.query.min() < 0 < found.query.max()
    assert found.gain == pytest.approx((found.before - found.after) / float(found.query[:, 0].std())) and found.gain > 0
    assert not found.harmful
    wild = adaptation(problem.at_factor(100.0), TaskMap())
    assert wild.gain < -1 and wild.harmful


def test_tasks_vmapped_and_looped_agree_on_conv4():
    torch.manual_seed(0)
    net = conv4(filters=8)
    labels = torch.arange(5).expand(3, 5)
    support, query = ((torch.rand(3, 5, 1, 28, 28), labels) for _ in range(2))
    problem = problem_of(net, support, query, 0.4, 2, criterion=F.cross_entropy)
    found = [adaptation(problem, each) for each in MAPS.values()]
    sets = [list(zip(*each, strict=True)) for each in (support, query)]
    queries, supports = by_hand(net, *sets, lambda k, name, grad, memory: 0.4 * grad, 2, F.cross_entropy)
    for each in found:
        torch.testing.assert_close(each.query, queries, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(each.support, supports, rtol=1e-3, atol=1e-4)


def test_batch_norm_with_running_statistics_uses_those_of_the_batch_in_training():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 1)).double()
    support, query = regression()
    kept = {name: value.clone() for name, value in net.named_buffers()}
    with isolated(net):
        found = adaptation(problem_of(net, stacked(support), stacked(query), 0.1, 2), TaskMap(strict=True))
    for name, value in net.named_buffers():
        assert torch.equal(value, kept[name])
    expected = by_hand(net, support, query, lambda k, name, grad, memory: 0.1 * grad, 2)
    torch.testing.assert_close(found.query, expected[0], rtol=1e-9, atol=0)


def test_accumulated_batches_count_alike():
    net, (support, query) = network(), regression(5)
    parts = [problem_of(net, stacked(support[a:b]), stacked(query[a:b]), 0.1, 2) for a, b in ((0, 2), (2, 5))]
    found = adaptation(AccumulatedProblem(tuple(parts)), TaskMap())
    queries, _ = by_hand(net, support, query, lambda k, name, grad, memory: 0.1 * grad, 2)
    torch.testing.assert_close(found.query, queries, rtol=1e-10, atol=0)
    assert found.parts == (2, 3)
    assert found.after == pytest.approx(float(queries[:2, -1].mean() + queries[2:, -1].mean()) / 2)


def test_plain_training_has_none():
    assert adaptation(PlainProblem({"w": torch.ones(1)}, lambda params: params["w"].sum()), TaskMap()) is None


def test_query_losses_are_computed_at_the_ends_alone():
    net, (support, query) = network(), regression()
    calls = []

    def counted(params, data):
        calls.append(data[0].shape[-2])
        return loss_of(net)(params, data)

    problem = MetaProblem(dict(net.named_parameters()), counted, support, query, 0.1, 5)
    adaptation(problem, TaskMap())
    assert calls.count(7) == 4 * 2 and calls.count(6) == 4 * 6


def test_nothing_is_left_behind():
    net, (support, query) = network(), regression()
    rates = {name: torch.full_like(value, 0.1).requires_grad_() for name, value in net.named_parameters()}
    learned = torch.ones(1, dtype=torch.float64, requires_grad=True)

    def update(params, grads, state):
        return {name: value - learned * grads[name] for name, value in params.items()}, state

    kept = {name: value.clone() for name, value in net.named_parameters()}
    state = torch.get_rng_state()
    for task_map in (TaskMap(strict=True), TaskMap(looped=True)):
        problem = problem_of(net, stacked(support), stacked(query), rates, 3, inner_update=update)
        found = adaptation(problem, task_map)
        assert not found.query.requires_grad and not found.support.requires_grad
        expected = by_hand(net, support, query, lambda k, name, grad, memory: 0.1 * grad, 3)
        torch.testing.assert_close(found.query, expected[0], rtol=1e-10, atol=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(value.grad is None for value in (*net.parameters(), *rates.values(), learned))
    assert all(torch.equal(value, kept[name]) for name, value in net.named_parameters())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, double_backward])
def test_gradients_may_be_off_around_it(mode):
    net, (support, query) = network(), regression()
    problem = problem_of(net, stacked(support), stacked(query), 0.1, 2)
    expected = adaptation(problem, TaskMap())
    with mode():
        assert torch.equal(adaptation(problem, TaskMap(strict=True)).query, expected.query)


def test_a_loss_that_takes_gradients_itself():
    net, (support, query) = network(), regression()

    def smooth(params, data):
        x = data[0].detach().requires_grad_()
        out = functional_call(net, params, (x,))
        (slope,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return F.mse_loss(out, data[1]) + 0.1 * (slope**2).mean()

    problem = MetaProblem(dict(net.named_parameters()), smooth, stacked(support), stacked(query), 0.1, 2)
    found = adaptation(problem, TaskMap(looped=True))
    assert not found.query.requires_grad and bool(torch.isfinite(found.query).all())


def test_half_precision_is_measured_in_float32():
    net = network().to(torch.bfloat16)
    support, query = ([(x.bfloat16(), y.bfloat16()) for x, y in each] for each in regression())
    problem = problem_of(net, stacked(support), stacked(query), 0.1, 3)
    found = adaptation(problem.at_factor(2**-12), TaskMap(strict=True))
    wide = [[(x.float(), y.float()) for x, y in each] for each in (support, query)]
    move = lambda k, name, grad, memory: 0.1 * 2**-12 * grad  # noqa: E731
    expected = by_hand(net.float(), *wide, move, 3)
    torch.testing.assert_close(found.query, expected[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize("way", MAPS)
def test_dropout_draws_the_same_masks_for_the_query_sets(way):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 1)).double()
    support, query = regression()
    problem = problem_of(net, stacked(support), stacked(query), 1e-9, 3)
    found = adaptation(problem, MAPS[way])
    assert found.query[:, 0].tolist() == pytest.approx(found.query[:, -1].tolist(), rel=1e-6)
    assert len({round(each, 9) for each in found.query[:, 0].tolist()}) == 4
    assert torch.equal(adaptation(problem, MAPS[way]).query, found.query)  # and at every call
    assert not torch.allclose(found.support[:, 0], found.support[:, 1])  # the inner loop's differ, as in training


def made(before, after, support=(1.0, 0.9)):
    query = torch.tensor([before, after], dtype=torch.float64).T
    return Adaptation(query, torch.tensor([support] * len(query), dtype=torch.float64), (len(query),))


@pytest.mark.parametrize(
    ("before", "after", "support", "harmful"),
    [
        ([3.0] * 4, [3.03, 3.02, 3.04, 3.03], (1, 0.9), False),  # sure, and 1 %
        ([3.0] * 4, [4.2, 4.1, 4.2, 4.0], (1, 0.9), True),  # sure, and a third
        ([3.0] * 4, [9.0, 2.5, 2.5, 2.5], (1, 0.9), False),  # a third, of one task
        ([3.0] * 4, [30.0, 2.5, 2.5, 2.5], (1, 0.9), False),  # threefold, of one task whose support loss falls
        ([3.0] * 4, [30.0, 2.5, 2.5, 2.5], (1, 1.1), True),  # threefold, and the inner loop climbs
        ([3.0] * 4, [770.0, 2.5, 2.5, 2.5], (1, 0.9), True),  # whatever the support loss says
        ([0.1], [0.3], (1, 0.9), False),  # one small task
        ([0.1], [0.3], (1, 2.0), True),
        ([0.1, 0.1], [0.15, 0.15], (1, 0.9), False),  # two tasks say nothing of noise
        ([-2.0, -1.0, -1.5], [-2.1, -1.1, -1.6], (1, 0.9), False),
        ([-2.0, -1.0, -1.5], [2.0, 1.0, 1.5], (1, 0.9), True),
        ([0.0] * 3, [0.0] * 3, (0, 0), False),
        ([2.0, 2.0, 0.0], [2.1, 2.1, 0.0], (1, 0.9), False),  # a task that is solved
        ([1.0] * 3, [math.nan, 1.0, 1.0], (1, 0.9), True),
        ([math.nan, 1.0, 1.0], [math.nan, 1.0, 1.0], (1, 0.9), False),
    ],
)
def test_what_counts_as_harmful(before, after, support, harmful):
    assert made(before, after, support).harmful is harmful


@pytest.mark.parametrize(
    ("support", "step"),
    [
        ((1.0, 0.5, 0.25, 0.1), None),
        ((1.0, 1.1, 1.5, 4.0), 1),
        ((1.0, 0.5, 1.5, 4.0), 2),
        ((1.0, 2.0, 0.5, 4.0), 3),
        ((1.0, 9.0, 5.0, 0.9), None),  # over and back
        ((1.0, 9.0, 5.0, 4.0), None),  # above its start, and falling
        ((1.0, 1.01, 1.02, 1.03), None),  # 3 %
        ((1.0, 5.0, math.inf, math.nan), 2),
        ((math.nan, math.nan), None),
        ((1.0, 4.0), 1),
        ((-1.0, -5.0), None),
    ],
)
def test_where_the_inner_loop_diverges(support, step):
    assert made([1.0] * 3, [1.0] * 3, support).diverges_at == step


def test_the_gain_where_losses_are_or_reach_zero():
    assert made([2.0, 2.0], [2.0, 0.0]).gain == pytest.approx(math.log(2))
    assert made([1.0, 3.0], [0.0, 0.0]).gain == pytest.approx(2 / math.sqrt(2))  # of the spread
    assert made([-1.0, -3.0], [-4.0, -4.0]).gain == pytest.approx(2 / math.sqrt(2))
    assert made([-2.0], [-3.0]).gain == pytest.approx(0.5)  # one task has no spread: of its size


def test_adaptations_of_several_processes_are_joined():
    found = Adaptation.of([made([1.0, 3.0], [2.0, 2.0]), made([5.0], [8.0])])
    assert found.parts == (2, 1) and found.before == 3.5 and found.after == 5.0
