"""`gradient` against torch.func.grad: nested, with closures, with and without a graph around it."""

import gc
import weakref

import pytest
import torch

from lightning_maml_guard.maml.inner_loop import gradient


def by_func(function, point):
    return torch.func.grad(function, has_aux=True)(point)


def point(**needs):
    torch.manual_seed(3)
    return {n: torch.randn(3, dtype=torch.float64).requires_grad_(needs.get(n, True)) for n in ("a", "b")}


def f(p):
    return (p["a"].sin() * p["b"] ** 2).sum(), p["a"] * 2


def nested(take):
    """One step along the gradient, then the gradient of the loss there: derivatives of second order."""

    def outer(p):
        inner, _ = take(f, p)
        moved = {name: value - 0.1 * inner[name] for name, value in p.items()}
        return f(moved)[0], inner

    return outer


def test_nested_gradients_and_what_comes_beside_are_those_of_torch_func():
    for function in (f, nested(gradient)):
        reference = f if function is f else nested(by_func)
        torch.testing.assert_close(gradient(function, point()), by_func(reference, point()), rtol=1e-12, atol=0)
    thrice, reference = (
        lambda p, take=take: (sum(g.pow(2).sum() for g in take(nested(take), p)[0].values()), ())
        for take in (gradient, by_func)
    )
    torch.testing.assert_close(gradient(thrice, point())[0], by_func(reference, point())[0], rtol=1e-12, atol=0)


def test_what_a_function_holds_from_outside_is_constant():
    """Also the point itself, and what was made from it."""
    p = point()
    square = p["a"] ** 2
    found, _ = gradient(lambda q: ((p["a"] * q["a"] + square * q["b"]).sum(), ()), p)
    torch.testing.assert_close(found, {"a": p["a"], "b": square}, check_stride=False)
    # and it can be differentiated again towards what was constant
    (outer,) = torch.autograd.grad(found["b"].sum(), p["a"])
    assert torch.equal(outer, 2 * p["a"])


def test_what_the_value_does_not_depend_on_has_gradient_zero():
    p = point()
    found, _ = gradient(lambda q: (q["a"].sum(), ()), p)
    assert torch.equal(found["b"], torch.zeros(3).double()) and torch.equal(found["a"], torch.ones(3).double())
    for constant in (torch.zeros(()), p["a"].sum()):
        found, _ = gradient(lambda q, c=constant: (c, ()), p)
        assert all(torch.equal(each, torch.zeros(3).double()) for each in found.values())


@pytest.mark.parametrize("needs", [{"a": False, "b": False}, {"a": False}, {}])
@pytest.mark.parametrize("enabled", [True, False])
def test_the_gradient_is_there_whatever_requires_one(needs, enabled):
    p = point(**needs)
    with torch.set_grad_enabled(enabled):
        found, extra = gradient(f, p)
        assert torch.is_grad_enabled() == enabled
    torch.testing.assert_close(found, by_func(f, point())[0])
    connected = enabled and any(value.requires_grad for value in p.values())
    assert extra.requires_grad == connected and found["a"].requires_grad == connected
    assert all(value.grad is None for value in p.values())
    if connected:
        wanted = [value for value in p.values() if value.requires_grad]
        reference = point(**needs)
        again = torch.autograd.grad(
            by_func(f, reference)[0]["a"].sum(), [v for v in reference.values() if v.requires_grad]
        )
        torch.testing.assert_close(torch.autograd.grad(found["a"].sum(), wanted), again)


class Token:
    pass


class Noted(torch.autograd.Function):
    """A node whose context holds something that can be watched."""

    @staticmethod
    def forward(ctx, x):
        ctx.token = Noted.latest = Token()
        return 3 * x

    @staticmethod
    def backward(ctx, outer):
        return 3 * outer


@pytest.mark.parametrize("depends", [True, False])
def test_nothing_keeps_a_graph_where_none_is_asked_for(depends):
    alive = []

    def function(q):
        middle = Noted.apply(q["a"])
        alive.append(weakref.ref(Noted.latest))
        Noted.latest = None
        return (middle if depends else middle.detach()).sum(), {"kept": middle + 1, "text": "as it is"}

    found, extra = gradient(function, point(a=False, b=False))
    gc.collect()
    assert alive[0]() is None and extra["text"] == "as it is"
    assert not extra["kept"].requires_grad and not any(each.requires_grad for each in found.values())


def test_one_value_a_task_gives_every_task_its_own():
    p = torch.randn(4, 3, dtype=torch.float64)
    found, extra = gradient(lambda q: ((q**3).sum(1), (q**3).sum(1)), p)
    torch.testing.assert_close(found, 3 * p**2)
    assert extra.shape == (4,)


def test_inside_transforms_it_is_torch_funcs():
    rows = torch.randn(4, 3, dtype=torch.float64)
    found = torch.func.vmap(lambda row: gradient(lambda q: ((q**3).sum(), q.sum()), row))(rows)
    torch.testing.assert_close(found, (3 * rows**2, rows.sum(1)))
    second = torch.func.grad(lambda row: gradient(lambda q: ((q**3).sum(), ()), row)[0].sum())(rows)
    torch.testing.assert_close(second, 6 * rows)
