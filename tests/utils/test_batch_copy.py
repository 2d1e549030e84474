"""Copies of batches: own type, own tensors, and what shows a change."""

import random
from collections import OrderedDict, UserDict, deque, namedtuple
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

from lightning_maml_guard.utils.batch_copy import BatchCopyError, changed, copied, trace
from tests.guard.changing import Encoding, Graph, Pair, Store

Named = namedtuple("Named", "x y")


@dataclass(slots=True)
class Slots:
    x: torch.Tensor


class Own:
    """Not for deepcopy, but with a clone of its own."""

    def __init__(self, x):
        self.x = x

    def __deepcopy__(self, memo):
        raise RuntimeError("no")

    def clone(self):
        return Own(self.x.clone())


def view():
    return torch.arange(1000.0)[3:6]


KINDS = {
    "tensor": (view, lambda b: b),
    "dict": (lambda: {"x": view()}, lambda b: b["x"]),
    "ordered": (lambda: OrderedDict(x=view()), lambda b: b["x"]),
    "user dict": (lambda: UserDict(x=view()), lambda b: b["x"]),
    "encoding": (lambda: Encoding(x=view()), lambda b: b["x"]),
    "mapping": (lambda: Store({"x": view()}), lambda b: b["x"]),
    "list": (lambda: [[view()]], lambda b: b[0][0]),
    "deque": (lambda: deque([view()]), lambda b: b[0]),
    "tuple": (lambda: (view(), 3), lambda b: b[0]),
    "named": (lambda: Named(view(), "y"), lambda b: b.x),
    "set": (lambda: {view()}, lambda b: next(iter(b))),
    "dataclass": (lambda: Pair(view(), view()), lambda b: b.x),
    "slots": (lambda: Slots(view()), lambda b: b.x),
    "graph": (lambda: Graph(view(), view()), lambda b: b.x),
    "packed": (lambda: nn.utils.rnn.pack_sequence([view()]), lambda b: b.data),
    "own": (lambda: [Own(view())], lambda b: b[0].x),
    "array": (lambda: [np.arange(3.0, 6.0)], lambda b: b[0]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_has_the_same_type_and_values_and_shares_no_memory(kind):
    make, tensor = KINDS[kind]
    batch = make()
    copy = copied(batch)
    assert type(copy) is type(batch) and tensor(copy).tolist() == [3.0, 4.0, 5.0]
    tensor(copy)[:] = 7.0
    assert tensor(batch).tolist() == [3.0, 4.0, 5.0]
    if isinstance(tensor(copy), torch.Tensor) and kind != "own":
        assert tensor(copied(batch)).untyped_storage().nbytes() == 12  # not the storage that the view lies in


def test_gradients_and_their_flags_are_kept_as_they_are():
    leaf = torch.ones(3, requires_grad=True)
    first, second, third = copied((leaf, leaf * 2, leaf))
    assert first.is_leaf and first.requires_grad and first is third and first.grad is None
    assert second.grad_fn is not None and copied(torch.ones(2)).requires_grad is False


@pytest.mark.parametrize("batch", [(each for each in ()), {"x": [open]}, [random.Random(0), None]])
def test_what_cannot_be_copied_is_named(batch):
    if isinstance(batch, (dict, list)):
        assert copied(batch) is not batch
        return
    with pytest.raises(BatchCopyError, match="generator cannot be copied: cannot pickle 'generator' object"):
        copied({"x": [batch]})


CHANGES = {
    "in place": ("dict", lambda b: b["x"].mul_(2)),
    "popped": ("dict", lambda b: b.pop("x")),
    "added": ("dict", lambda b: b.update(z=1)),
    "replaced": ("user dict", lambda b: b.update(x=b["x"] * 2)),
    "attribute": ("graph", lambda b: setattr(b, "x", b.x * 2)),
    "a new one": ("dataclass", lambda b: setattr(b, "z", 1)),
    "a longer list": ("list", lambda b: b.append(1)),
    "in a tuple": ("tuple", lambda b: b[0].add_(1)),
    "a flag": ("named", lambda b: b.x.requires_grad_()),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_shows_and_reading_does_not(change):
    kind, write = CHANGES[change]
    make, tensor = KINDS[kind]
    batch = make()
    before = trace(batch)
    (tensor(batch) * 2).sum()
    assert not changed(before, batch)
    write(batch)
    assert changed(before, batch)


@pytest.mark.parametrize("kind", ["slots", "array"])
def test_what_cannot_be_followed_is_said(kind):
    assert trace(KINDS[kind][0]()) is None and trace([iter([1])]) is None
