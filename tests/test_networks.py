import pytest
import torch

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
