import math

import pytest
import torch

from lightning_maml_guard import MetaProblem

GOOD = {
    "params": {"w": torch.ones(2, 3)},
    "task_loss": lambda params, data: params["w"].sum(),
    "support": (torch.ones(4, 1),),
    "query": (torch.ones(4, 1),),
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"params": [torch.ones(2)]}, TypeError, "`params` to be a dict from names to tensors but got list"),
        ({"params": {}}, ValueError, "`params` to hold at least one parameter"),
        ({"task_loss": 3}, TypeError, "`task_loss` to be callable, .* but got 3"),
        ({"inner_lr": -1.0}, ValueError, "`inner_lr` to be a finite number of at least 0"),
        (
            {"inner_lr": {"v": torch.ones(1)}},
            ValueError,
            r"names \['v'\], which are not among the parameters",
        ),
        ({"order": "zeroth"}, ValueError, "`order` to be one of"),
        ({"inner_steps": 0}, ValueError, "`inner_steps`"),
        ({"query": (torch.ones(3, 1),)}, ValueError, "4 tasks in `support` and 3 in `query`"),
        ({"support": ()}, ValueError, "share a leading task dimension"),
        ({"task_chunk_size": 0}, ValueError, "`task_chunk_size`"),
    ],
)
def test_bad_problems_are_named(change, error, message):
    with pytest.raises(error, match=message):
        MetaProblem(**{**GOOD, **change})


def test_rates_expand_to_every_entry():
    one = MetaProblem(**GOOD, inner_lr=0.1)
    assert one.uniform and one.alpha == 0.1 and torch.equal(one.rates()["w"], torch.full((2, 3), 0.1))
    several = MetaProblem(**GOOD, inner_lr={"w": torch.tensor([[0.1], [0.3]])})
    assert not several.uniform and several.alpha == pytest.approx(0.3)
    assert several.rates()["w"].shape == (2, 3)
    none = MetaProblem(**GOOD, inner_lr={})
    assert none.alpha == 0.0 and float(none.rates()["w"].max()) == 0.0


@pytest.mark.parametrize("rate", [math.nan, math.inf])
def test_a_learned_rate_that_is_not_finite_is_named(rate):
    with pytest.raises(ValueError, match="inner rate of 'w' holds"):
        MetaProblem(**GOOD, inner_lr={"w": torch.tensor(rate)}).rates()
