"""The first block from patches, against convolution, norm and pooling one after another in float64, at every order."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_maml_guard import networks
from lightning_maml_guard.kernels import first_block as _first_block
from lightning_maml_guard.kernels.first_block import first_block, is_applicable
from lightning_maml_guard.networks import conv4
from tests.kernels.test_norm_block import EPS, close, derivatives, native, primitive

CONV = nn.Conv2d(1, 3, 3, padding=1)


def given(n=5, height=8, width=6):
    torch.manual_seed(0)
    weight, gamma, beta = torch.randn(3, 1, 3, 3), torch.tensor([1.3, -0.7, 0.4]), torch.tensor([0.2, 0.1, -0.3])
    return torch.randn(n, 1, height, width).double(), [v.double().requires_grad_() for v in (weight, gamma, beta)]


def ours(images):
    return lambda weight, gamma, beta, pool: first_block(images, weight, gamma, beta, EPS).contiguous()


def layers(images, norm):
    return lambda weight, gamma, beta, pool: norm(F.conv2d(images, weight, padding=1), gamma, beta, pool)


@pytest.mark.parametrize("size", [(8, 6), (2, 2), (4, 10)])
def test_value_and_derivatives_to_the_third_are_those_of_the_layers(size):
    images, parameters = given(5, *size)
    close(derivatives(ours(images), parameters, True, 2), derivatives(layers(images, native), parameters, True, 2))
    close(derivatives(ours(images), parameters, True, 3), derivatives(layers(images, primitive), parameters, True, 3))


def test_torchs_own_checks_of_derivatives_pass():
    images, parameters = given(2, 4, 4)
    assert torch.autograd.gradcheck(lambda *each: ours(images)(*each, True), parameters)
    assert torch.autograd.gradgradcheck(lambda *each: ours(images)(*each, True), parameters)


def test_ties_have_the_gradients_of_max_pooling():
    images, parameters = given(5, 12, 12)
    images = torch.ones_like(images)
    images[:, :, 4:7, 3:5] = 0
    images[2:, :, 8, 8] = 0
    close(derivatives(ours(images), parameters, True, 2), derivatives(layers(images, native), parameters, True, 2))


def test_many_blocks_of_windows_are_one(monkeypatch):
    images, parameters = given()
    whole = derivatives(ours(images), parameters, True, 2)
    monkeypatch.setattr(_first_block, "_ROWS", 7)
    close(derivatives(ours(images), parameters, True, 2), whole, 1e-13)


def test_a_filter_that_takes_nearly_all_away_costs_single_precision_no_more_digits_than_torch():
    """Smooth spots under a Laplacian: variances a thousandth of the pixels', lost in a single-precision covariance."""
    torch.manual_seed(0)
    from_centre = torch.arange(64) - 31.5
    spot = torch.exp(-(from_centre.unsqueeze(1) ** 2 + from_centre**2) / 200)
    images = 100 * (torch.rand(20, 1, 1, 1) + 0.5) * spot
    weight = torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]).view(1, 1, 3, 3)
    single = weight, torch.ones(1), torch.zeros(1)
    exact = layers(images.double(), native)(*(each.double() for each in single), True)
    found, torchs = (
        (each - exact).norm() / exact.norm()
        for each in (ours(images)(*single, True), layers(images, native)(*single, True))
    )
    assert float(found) < 2 * float(torchs) < 1e-4


@pytest.mark.parametrize(
    ("images", "conv"),
    [
        (torch.zeros(30, 1, 27, 28), CONV),
        (torch.zeros(30, 1, 28, 27), CONV),
        (torch.zeros(30, 2, 28, 28), nn.Conv2d(2, 3, 3, padding=1)),
        (torch.zeros(5, 1, 28, 28), CONV),  # few
        (torch.zeros(30, 1, 28, 28, requires_grad=True), CONV),
        (torch.zeros(30, 1, 28, 28).half(), CONV),
        (torch.zeros(30, 1, 28, 28).double(), CONV),
        (torch.zeros(30, 1, 28, 28, device="meta"), CONV),
        (torch.zeros(1, 280, 280), CONV),
        (torch.zeros(30, 1, 28, 28), nn.Conv2d(1, 3, 3, padding=1, stride=2)),
        (torch.zeros(30, 1, 28, 28), nn.Conv2d(1, 3, 5, padding=2)),
        (torch.zeros(30, 1, 28, 28), nn.Conv2d(1, 3, 3, padding="same")),
    ],
)
def test_other_images_and_layers_go_the_usual_way(images, conv):
    assert not is_applicable(images, conv) and is_applicable(torch.zeros(30, 1, 28, 28), CONV)


def test_transforms_and_autocast_go_the_usual_way():
    images, seen = torch.zeros(2, 30, 1, 28, 28), []
    torch.func.vmap(lambda each: seen.append(is_applicable(each, CONV)) or each)(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        seen.append(is_applicable(images[0], CONV))
    assert seen == [False, False]


def test_conv4_is_its_layers_one_after_another_for_many_images(monkeypatch):
    torch.manual_seed(0)
    network, images = conv4(3, 1, 4, 16).double(), torch.randn(9, 1, 16, 16).double()
    for each in (network.features[1].weight, network.features[1].bias):
        nn.init.normal_(each)
    monkeypatch.setattr(_first_block, "_FEW", 0)
    results, used = [], []
    monkeypatch.setattr(networks, "first_block", lambda *args: used.append(1) or first_block(*args))
    for logits in (network(images), network.head(torch.flatten(network.features(images), 1))):
        first = torch.autograd.grad(logits.pow(2).sum(), network.parameters(), create_graph=True)
        second = torch.autograd.grad(sum(each.pow(2).sum() for each in first), network.parameters())
        results.append([logits, *first, *second])
    assert used == [1]
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)
