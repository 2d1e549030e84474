"""Query sets one after another behind inner loops side by side, against one task after another."""

import pytest
import torch

from lightning_maml_guard import MetaProblem
from lightning_maml_guard.maml import sequential_queries as apart
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.utils.task_map import TaskMap


def problem(rates=0.1, steps=2, order="exact", queries=4):
    torch.manual_seed(0)
    params = {"w": torch.randn(3, 5), "b": torch.randn(5), "v": torch.randn(5, 1)}
    params = {name: value.double().requires_grad_() for name, value in params.items()}

    def loss(theta, data):
        x, y = data
        return ((torch.tanh(x @ theta["w"] + theta["b"]) @ theta["v"] - y) ** 2).mean()

    def data(count):
        return torch.randn(6, count, 3).double(), torch.randn(6, count, 1).double()

    rates = (
        {name: torch.full_like(params[name], rates[name]).requires_grad_() for name in rates}
        if isinstance(rates, dict)
        else rates
    )
    return MetaProblem(params, loss, data(3), data(queries), inner_lr=rates, inner_steps=steps, order=order)


def outputs(theta, data):
    return {"first": data[0] @ theta["w"], "sum": theta["b"].sum()}


@pytest.mark.parametrize("chunk", [None, 4])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize(
    ("rates", "learned"), [(0.1, False), ({"w": 0.2, "v": 0.05}, False), ({"w": 0.2, "b": 0.1, "v": 0.05}, True)]
)
def test_the_gradients_losses_and_outputs_are_those_of_one_task_after_another(
    rates, learned, steps, chunk, monkeypatch
):
    given, used = problem(rates, steps), []
    options = {"learn_rates": learned, "auxiliary": outputs}
    expected = meta_gradient(given, tasks=TaskMap(looped=True), **options)
    monkeypatch.setattr(apart, "_LARGE", 0)
    real = apart.exact_gradients
    monkeypatch.setattr(apart, "exact_gradients", lambda *args, **named: used.append(1) or real(*args, **named))
    found = meta_gradient(given, tasks=TaskMap(chunk, strict=True), **options)
    assert len(used) == (1 if chunk is None else 2)
    torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-10, atol=1e-12)
    assert not any(value.requires_grad for value in (*found.gradients.values(), found.losses))


def test_large_query_sets_on_a_cpu_go_apart_unless_somebody_differentiates_what_comes_of_them():
    small, large = problem(), problem(queries=2**15)
    constant = {name: value.detach() for name, value in large.params.items()}
    assert apart.is_worthwhile(constant, large.query) and not apart.is_worthwhile(constant, small.query)
    assert not apart.is_worthwhile(large.params, large.query)
    with torch.no_grad():
        assert apart.is_worthwhile(large.params, large.query)
    assert not apart.is_worthwhile(constant, tuple(each.to("meta") for each in large.query))
    seen = []
    torch.func.vmap(lambda each: seen.append(apart.is_worthwhile(constant, (each,))) or each)(large.query[0])
    assert seen == [False]


@pytest.mark.parametrize("order", ["first", "simplified"])
def test_other_orders_stay_together(order, monkeypatch):
    monkeypatch.setattr(apart, "exact_gradients", None)
    monkeypatch.setattr(apart, "_LARGE", 0)
    found, expected = (meta_gradient(problem(order=order), tasks=TaskMap(looped=looped)) for looped in (False, True))
    torch.testing.assert_close(found.gradients, expected.gradients, rtol=1e-10, atol=1e-12)
