"""Random states."""

import pytest
import torch

from lightning_maml_guard.utils import random_state
from lightning_maml_guard.utils.random_state import seed_generators


@pytest.mark.parametrize("only_cpu", [True, False])
def test_masks_are_the_same_whatever_was_drawn_before(monkeypatch, only_cpu):
    monkeypatch.setattr(random_state, "_only_cpu", lambda: only_cpu)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.rand(7)
    seed_generators()
    assert torch.equal(torch.rand(3), expected)
