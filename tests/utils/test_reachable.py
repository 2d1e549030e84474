"""Modules are found wherever a loss may hold them, and nothing else is."""

import functools
import types

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from lightning_maml_guard.utils.reachable import modules_of

NET, OTHER = nn.Linear(1, 1), nn.Linear(1, 1)
HELD = {"nets": [NET]}
PLACE = types.ModuleType("place")
PLACE.net, PLACE.other = NET, OTHER


class Experiment:
    def __init__(self):
        self.net, self.unused = NET, OTHER

    def forward(self, x):
        return self.net(x)

    def loss(self, params, data):
        return self.forward(data)

    def __call__(self, params, data):
        return self.loss(params, data)


def helper(x):
    return F.relu(NET(x))


def through_a_helper(params, data):
    return helper(data)


def through_a_global_list(params, data):
    return [net(data) for net in HELD["nets"]]


def with_a_default(params, data, net=NET):
    return net(data)


def through_a_python_module(params, data):
    return functional_call(PLACE.net, params, (data,))


def in_a_closure():
    net = NET
    return lambda params, data: torch.vmap(lambda x: net(x))(data)


def test_modules_are_found_and_only_those_that_are_named():
    for loss in (
        through_a_helper,
        through_a_global_list,
        with_a_default,
        through_a_python_module,
        in_a_closure(),
        Experiment().loss,
        Experiment(),
        functools.partial(lambda net, params, data: net(data), NET),
        torch.func.vmap(in_a_closure()),
        NET.forward,
    ):
        assert [each is NET for each in modules_of(loss)] == [True], loss


def test_parts_of_a_module_that_is_found_are_left_out_and_none_is_fine():
    whole = nn.Sequential(NET, nn.Tanh())
    assert modules_of(lambda params, data: whole(NET(data))) == [whole]
    assert modules_of(lambda params, data: F.mse_loss(params["w"], data), torch.sum, None) == []
