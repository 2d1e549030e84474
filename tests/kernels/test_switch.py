"""With the kernels switched off the networks give the same numbers from torch's layers alone."""

import os
import subprocess
import sys

import pytest
import torch

from lightning_maml_guard import kernels, networks
from lightning_maml_guard.kernels.allocator import held, hold
from lightning_maml_guard.networks import conv4

KERNELS = ("first_block", "convolve", "norm_relu_pool")


@pytest.mark.parametrize(("channels", "strided"), [(1, False), (1, True), (2, False), (2, True)])
def test_off_the_networks_use_no_kernel_and_give_the_same_numbers(channels, strided, monkeypatch):
    torch.manual_seed(0)
    network = conv4(3, channels, 4, 16, strided).double()
    for name, value in network.named_parameters():
        if value.dim() == 1 and "head" not in name:
            torch.nn.init.normal_(value)  # scales of both signs, shifts, biases
    images = torch.randn(70, channels, 16, 16).double()  # as many as the first block's kernel wants
    used, results = [], []
    for name in KERNELS:
        kernel = getattr(networks, name)
        monkeypatch.setattr(networks, name, lambda *args, f=kernel, n=name, **kw: used.append(n) or f(*args, **kw))
    monkeypatch.setattr(networks, "is_worthwhile", lambda images: True)  # in float64 it would not be
    for enabled in (True, False):
        monkeypatch.setattr(kernels, "_ENABLED", enabled)
        used.clear()
        logits = network(images)
        results.append([logits, *torch.autograd.grad(logits.pow(2).sum(), network.parameters())])
        expected = {"norm_relu_pool", "convolve"} | ({"first_block"} if channels == 1 and not strided else set())
        assert set(used) == (expected if enabled else set())
    torch.testing.assert_close(*results, rtol=1e-8, atol=1e-9)


def test_off_the_allocator_holds_nothing(monkeypatch):
    class Holder:
        pass

    monkeypatch.setattr(kernels, "_ENABLED", False)
    holder = Holder()
    assert not hold(holder) and not held()


@pytest.mark.parametrize(("value", "enabled"), [(None, "True"), ("1", "True"), ("0", "False"), ("OFF", "False")])
def test_the_environment_variable_decides(value, enabled):
    environment = {name: each for name, each in os.environ.items() if name != "LMG_KERNELS"}
    if value is not None:
        environment["LMG_KERNELS"] = value
    program = "from lightning_maml_guard.kernels import kernels_enabled; print(kernels_enabled())"
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True, timeout=120
    )
    assert run.stdout.split() == [enabled]


def test_another_value_is_an_error():
    with pytest.raises(ValueError, match="`LMG_KERNELS` to be 0, off, 1 or on but got 'maybe'"):
        kernels._from_environment("maybe")
