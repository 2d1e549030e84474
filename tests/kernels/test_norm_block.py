"""Batch norm, ReLU and pooling in one, against torch's own layers in float64, at every order and under transforms."""

import pytest
import torch
import torch.nn.functional as F

from lightning_maml_guard.kernels import pooling
from lightning_maml_guard.kernels.channels_last import is_channels_last
from lightning_maml_guard.kernels.norm_block import norm_relu_pool

EPS = 1e-5


def native(z, gamma, beta, pool):
    """What the layers of a block compute, from torch's own kernels."""
    y = F.relu(F.batch_norm(z, None, None, gamma, beta, True, 0.1, EPS))
    return F.max_pool2d(y, 2) if pool else y


def primitive(z, gamma, beta, pool):
    """The same with the norm written out: native batch norm is wrong at the third order (torch 2.13)."""
    centred = z - z.mean((0, 2, 3), keepdim=True)
    normed = centred * torch.rsqrt((centred * centred).mean((0, 2, 3), keepdim=True) + EPS)
    y = F.relu(normed * gamma.reshape(-1, 1, 1) + beta.reshape(-1, 1, 1))
    return F.max_pool2d(y, 2) if pool else y


def ours(z, gamma, beta, pool):
    return norm_relu_pool(z, gamma, beta, EPS, pool)


def last(z, gamma, beta, pool):
    """The channels of an entry beside each other in memory."""
    return norm_relu_pool(z.contiguous(memory_format=torch.channels_last), gamma, beta, EPS, pool)


LAYOUTS = pytest.mark.parametrize("block", [ours, last])


def inputs(height=6, width=6, n=4, dtype=torch.float64):
    z = torch.randn(n, 3, height, width, dtype=dtype)
    gamma, beta = torch.tensor([1.3, -0.7, 0.4], dtype=dtype), torch.tensor([0.2, 0.1, -0.3], dtype=dtype)
    return [each.requires_grad_() for each in (z, gamma, beta)]


def close(found, expected, relative=1e-10):
    for a, b in ((a.detach(), b.detach()) for a, b in zip(found, expected, strict=True)):
        assert float((a - b).norm()) <= relative * max(float(b.norm()), 1e-3), (float((a - b).norm()), float(b.norm()))


def derivatives(function, given, pool, order):
    """Value and derivatives of smooth functionals of all three inputs, each order from the one before."""
    torch.manual_seed(7)
    y = function(*given, pool)
    found = [y.detach()]
    value = (y**2 * torch.randn(y.shape, dtype=y.dtype)).sum()
    for _ in range(order):
        gradients = torch.autograd.grad(value, given, create_graph=True)
        found += [each.detach() for each in gradients]
        value = sum((each**2 * torch.randn(each.shape, dtype=each.dtype)).sum() for each in gradients)
    return found


@pytest.mark.parametrize("pool", [True, False])
@pytest.mark.parametrize("size", [(6, 6), (7, 5), (2, 3)])
@LAYOUTS
def test_value_and_derivatives_to_the_third_are_those_of_the_layers(block, size, pool):
    given = inputs(*size)
    close(derivatives(block, given, pool, 2), derivatives(native, given, pool, 2))
    close(derivatives(block, given, pool, 3), derivatives(primitive, given, pool, 3))


@pytest.mark.parametrize("pool", [True, False])
@LAYOUTS
def test_torchs_own_checks_of_derivatives_pass(block, pool):
    given = inputs(3, 4, n=2)
    assert torch.autograd.gradcheck(lambda *g: block(*g, pool), given)
    assert torch.autograd.gradgradcheck(lambda *g: block(*g, pool), given)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (1, 2), (0, 2)])
def test_any_of_the_inputs_may_be_constant(needed):
    given = [each.requires_grad_(index in needed) for index, each in enumerate(t.detach() for t in inputs())]
    asked = [given[index] for index in needed]
    found, expected = [], []
    for function, into in ((ours, found), (native, expected)):
        first = torch.autograd.grad(function(*given, True).pow(2).sum(), asked, create_graph=True)
        value = sum(each.pow(2).sum() for each in first)
        into += [*first, *torch.autograd.grad(value, asked, allow_unused=True, materialize_grads=True)]
    close(found, expected)


@LAYOUTS
def test_ties_give_the_convolution_the_gradients_of_max_pooling(block):
    """Flat regions, as white paper in Omniglot: whole windows are equal, up to what lies around them."""
    images = torch.ones(5, 1, 12, 12, dtype=torch.float64)
    images[:, :, 4:7, 3:5] = 0
    images[2:, :, 8, 8] = 0
    weight = torch.randn(3, 1, 3, 3, dtype=torch.float64, requires_grad=True)
    _, gamma, beta = inputs()

    def of(function):
        y = function(F.conv2d(images, weight, padding=1), gamma, beta, True)
        first = torch.autograd.grad(y.pow(2).sum(), [weight, gamma, beta], create_graph=True)
        return [y, *first, *torch.autograd.grad(sum(each.pow(2).sum() for each in first), [weight, gamma, beta])]

    close(of(block), of(native))


@pytest.mark.parametrize("batched", [(0, 0, 0), (0, None, None), (1, None, 0), (None, 0, 0), (None, None, 0)])
def test_vmapped_it_is_each_tasks_own(batched):
    """z with the tasks at any place, or shared; the same of scale and shift."""
    z, gamma, beta = inputs()
    given = [
        (
            each.detach() if dim is None else torch.stack([each.detach(), 0.5 * each.detach() + 0.1], dim)
        ).requires_grad_()
        for each, dim in zip((z, gamma, beta), batched, strict=True)
    ]
    found = torch.func.vmap(lambda *g: ours(*g, True), batched)(*given)
    expected = torch.stack(
        [
            native(
                *(each if dim is None else each.select(dim, t) for each, dim in zip(given, batched, strict=True)), True
            )
            for t in range(2)
        ]
    )
    both = []
    for y in (found, expected):
        first = torch.autograd.grad(y.pow(2).sum(), given, create_graph=True)
        both.append([y, *first, *torch.autograd.grad(sum(each.pow(2).sum() for each in first), given)])
    close(*both)


def test_what_a_vmap_shares_keeps_its_gradient():
    given = inputs()
    y = torch.func.vmap(lambda factor: factor * ours(*given, True))(torch.tensor([1.0, 2.0]))
    close(torch.autograd.grad(y.sum(), given), torch.autograd.grad(3 * native(*given, True).sum(), given))


def test_under_torch_func_and_nested_vmaps_the_derivatives_are_the_same():
    given = [each.detach() for each in inputs()]

    def loss(function):
        return lambda *g: function(*g, True).pow(2).sum()

    found, expected = (torch.func.grad(loss(f), (0, 1, 2))(*given) for f in (ours, native))
    close(found, expected)
    second = [
        torch.func.grad(lambda z, f=f: sum(g.pow(2).sum() for g in torch.func.grad(loss(f), (0, 1))(z, *given[1:])))(
            given[0]
        )
        for f in (ours, primitive)
    ]
    close(second[:1], second[1:])
    zs = torch.stack([given[0], 2 * given[0] + given[0].sin()])
    each = [torch.func.grad(loss(native), (0, 1, 2))(z, *given[1:]) for z in zs]
    found = torch.func.vmap(torch.func.grad(loss(ours), (0, 1, 2)), (0, None, None))(zs, *given[1:])
    close(found, [torch.stack(group) for group in zip(*each, strict=True)])
    nested = torch.func.vmap(torch.func.vmap(lambda z: ours(z, *given[1:], True)))(zs.unsqueeze(0))
    close([nested[0]], [torch.stack([native(z, *given[1:], True) for z in zs])])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_the_layers(dtype):
    z, gamma, beta = (each.detach().to(dtype) for each in inputs(8, 8, n=6))
    found, expected = ours(z, gamma, beta, True), native(z, gamma, beta, True)
    assert found.dtype == dtype
    close([found.double()], [expected.double()], 2e-2)
    # autocast: half-precision images, float32 parameters
    found = ours(z, gamma.float(), beta.float(), True)
    assert found.dtype == dtype
    close([found.double()], [expected.double()], 2e-2)


@pytest.mark.parametrize("pool", [True, False])
@LAYOUTS
def test_many_blocks_of_images_are_one(block, pool, monkeypatch):
    given = inputs(n=7)
    whole = derivatives(block, given, pool, 2)
    monkeypatch.setattr(pooling, "_BLOCK", 3 * 36 * 2)  # two images, the last block smaller
    close(derivatives(block, given, pool, 2), whole, 1e-14)


def test_what_is_derived_keeps_its_layout():
    z, gamma, beta = inputs(7, 6)
    found = last(z, gamma, beta, True)
    for _ in range(3):
        assert is_channels_last(found)
        (found,) = torch.autograd.grad(found.pow(2).sum(), z, create_graph=True)
    assert is_channels_last(found)


@LAYOUTS
def test_nan_and_inf_come_out_where_the_layers_let_them_out(block):
    for bad in (float("nan"), float("inf")):
        z, gamma, beta = (each.detach().clone() for each in inputs())
        z[1, 0, 2, 3] = bad
        found = block(z, gamma, beta, True)
        assert torch.equal(found.isnan(), native(z, gamma, beta, True).isnan()) and found[:, 0].isnan().all()
    z, gamma, beta = (each.detach().clone() for each in inputs())
    gamma[2] = float("nan")
    assert block(z, gamma, beta, True)[:, 2].isnan().all()


def test_the_memory_format_changes_nothing_and_the_input_is_not_written_to():
    z, gamma, beta = inputs(7, 6)
    before = z.detach().clone()
    expected = derivatives(native, [z, gamma, beta], True, 2)
    last = z.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    strided = z.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()
    for each in (last, strided):
        close(derivatives(ours, [each, gamma, beta], True, 2), expected)
        assert torch.equal(each, before)


def test_flat_channels_and_empty_or_meta_tensors_do_not_break_it():
    flat = torch.full((3, 3, 4, 4), 0.25, dtype=torch.float64)
    _, gamma, beta = inputs()
    close([ours(flat, gamma, beta, True)], [native(flat, gamma, beta, True)])
    assert ours(flat[:0], gamma, beta, True).shape == (0, 3, 2, 2)
    meta = [each.detach().to("meta") for each in (flat, gamma, beta)]
    assert ours(*meta, True).shape == (3, 3, 2, 2)
