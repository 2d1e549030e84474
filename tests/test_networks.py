import copy
from dataclasses import replace

import pytest
import torch

from lightning_maml_guard import CurvatureOptions, MetaLearningModule, measure, networks
from lightning_maml_guard.kernels.channels_last import is_worthwhile
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import conv4, mlp


def count(network):
    return sum(p.numel() for p in network.parameters())


def test_the_sinusoid_net_has_finns_1761_parameters():
    assert count(mlp()) == 1761 and mlp()(torch.zeros(7, 1)).shape == (7, 1)


def test_conv4_has_the_published_size_for_omniglot():
    assert count(conv4()) == 112_261
    assert conv4()(torch.zeros(3, 1, 28, 28)).shape == (3, 5)


@pytest.mark.parametrize(
    ("size", "channels", "filters", "strided"), [(84, 3, 32, False), (28, 1, 64, True), (28, 1, 64, False)]
)
def test_conv4_takes_its_image_sizes(size, channels, filters, strided):
    network = conv4(5, channels, filters, size, strided)
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 5)


def test_conv4_uses_batch_statistics_in_evaluation_too():
    network, x = conv4(filters=4), torch.randn(6, 1, 28, 28)
    torch.testing.assert_close(network.train()(x), network.eval()(x))
    assert list(network.buffers()) == []


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mlp(activation="sine"), "`activation` to be one of .* but got 'sine'"),
        (lambda: mlp(hidden=[0]), r"`hidden\[0\]` to be an integer of at least 1 but got 0"),
        (lambda: conv4(filters=0), "`filters` to be an integer of at least 1 but got 0"),
        (lambda: conv4(image_size=8), "`image_size` to be at least 16 .* but got 8"),
    ],
)
def test_bad_sizes_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_an_empty_hidden_list_is_a_linear_model():
    assert count(mlp(3, [], 2)) == 8


def by_layers(network, images):
    return network.head(torch.flatten(network.features(images), 1))


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize(
    ("channels", "size", "strided"), [(2, 16, False), (2, 28, False), (2, 21, True), (1, 29, False), (1, 22, True)]
)
def test_conv4_is_its_layers_one_after_another(channels, size, strided, last, monkeypatch):
    monkeypatch.setattr(networks, "is_worthwhile", lambda images: last)  # in float64 it would not
    network = conv4(3, channels, 4, size, strided).double()
    for name, value in network.named_parameters():
        if value.dim() == 1 and "head" not in name:
            torch.nn.init.normal_(value)  # scales of both signs, shifts, biases
    images = torch.randn(5, channels, size, size).double()
    found, expected = network(images), by_layers(network, images)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    gradients = []
    for logits in (found, expected):
        network.zero_grad()
        logits.pow(2).sum().backward()
        gradients.append({name: value.grad for name, value in network.named_parameters()})
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-9)
    biases = [name for name in gradients[0] if name.endswith("bias") and f"{name[:-5]}.weight" in gradients[0]]
    convs = [n for n in biases if network.get_parameter(f"{n[:-5]}.weight").dim() == 4]
    assert len(convs) == 4 and all(torch.equal(gradients[0][n], torch.zeros(4).double()) for n in convs)


@pytest.mark.parametrize(
    ("order", "channels", "strided"),
    [("exact", 1, False), ("exact", 2, True), ("first", 2, False), ("simplified", 2, False)],
)
def test_the_layout_changes_no_meta_gradient_and_no_curvature(order, channels, strided, monkeypatch):
    torch.manual_seed(0)
    module = MetaLearningModule(conv4(3, channels, 4, 16, strided).double(), inner_lr=0.1, inner_steps=2, order=order)
    images = torch.randn(2, 6, channels, 16, 16).double()
    batch = (
        (images, torch.arange(6).remainder(3).expand(2, 6)),
        (images.flip(1), torch.arange(6).flip(0).remainder(3).expand(2, 6)),
    )
    problem, found = replace(module.meta_problem(batch), looped=True), []
    for last in (False, True):
        monkeypatch.setattr(networks, "is_worthwhile", lambda images, last=last: last)
        report = measure(problem, beta=0.1, curvature=CurvatureOptions(max_iter=4))
        found.append(
            (meta_gradient(problem).gradients, report.lambda_max, report.exact_beta_c, report.predicted_change)
        )
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("channels", "filters", "size"), [(1, 64, 28), (3, 8, 32)])
def test_single_precision_is_within_rounding_of_double_in_the_layout_that_pays(channels, filters, size):
    network, images = conv4(5, channels, filters, size), torch.randn(6, channels, size, size)
    assert is_worthwhile(images) == torch.backends.mkldnn.is_available() and not is_worthwhile(images.double())
    double = copy.deepcopy(network).double()
    torch.testing.assert_close(network(images).double(), double(images.double()), rtol=1e-3, atol=1e-4)


def test_padding_by_name_is_torchs():
    network, images = conv4(filters=4, image_size=17).eval(), torch.randn(3, 1, 17, 17)
    before = network(images)
    network.features[0].padding = "same"
    torch.testing.assert_close(network(images), before)


def test_conv4_keeps_its_names_and_takes_copies_and_autocast():
    network = conv4(filters=4, image_size=16)
    expected = [f"features.{4 * b + i}.{kind}" for b in range(4) for i in (0, 1) for kind in ("weight", "bias")]
    assert list(network.state_dict()) == [*expected, "head.weight", "head.bias"]
    images = torch.randn(6, 1, 16, 16)
    assert torch.equal(copy.deepcopy(network)(images), network(images))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = network(images), by_layers(network, images)
    assert found.dtype == torch.bfloat16 and float((found - expected).detach().norm() / expected.detach().norm()) < 0.1


def statistics():
    norm = torch.nn.BatchNorm2d(4)
    torch.nn.init.constant_(norm.running_mean, 1.0)
    return norm


@pytest.mark.parametrize(
    ("place", "layer"),
    [
        (2, torch.nn.Tanh),
        (1, lambda: torch.nn.GroupNorm(2, 4)),
        (1, statistics),
        (1, lambda: torch.nn.BatchNorm2d(4, affine=False, track_running_stats=False)),
        (0, lambda: torch.nn.Conv2d(1, 4, 3, padding=1, bias=False)),
        (0, lambda: torch.nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")),
        (0, lambda: torch.nn.Conv2d(1, 4, 3, padding=2, dilation=2)),
        (4, lambda: torch.nn.Conv2d(4, 4, 3, padding=1, groups=2)),
        (3, lambda: torch.nn.MaxPool2d(3, stride=2, padding=1)),
        (3, lambda: torch.nn.MaxPool2d(2, ceil_mode=True)),
    ],
)
def test_a_conv4_with_another_layer_in_it_runs_that_layer(place, layer):
    network, images = conv4(filters=4, image_size=17).eval(), torch.randn(3, 1, 17, 17)
    network.features[place] = layer()
    if place == 3:
        network.head = torch.nn.LazyLinear(5)
    assert torch.equal(network(images), by_layers(network, images))


def test_hooks_on_the_layers_of_a_conv4_are_called():
    network, images, called = conv4(filters=4, image_size=16), torch.randn(3, 1, 16, 16), []
    before = network(images)
    for listen in (network.features[2].register_forward_hook, network.features[5].register_forward_pre_hook):
        handle = listen(lambda *args: called.append(1))
        torch.testing.assert_close(network(images), before, rtol=1e-4, atol=1e-5)
        handle.remove()
    handle = network.features[3].register_full_backward_hook(lambda *args: called.append(2))
    network(images).sum().backward()
    handle.remove()
    network(images)
    assert called == [1, 1, 2]
