"""What was tried somewhere on some batches is not tried there again; elsewhere it is."""

import torch
from torch import nn
from torch.optim import SGD

from lightning_maml_guard.lookahead.divergence import Scale
from lightning_maml_guard.lookahead.lookahead import Lookahead
from lightning_maml_guard.lookahead.rate_search import RateSearch
from lightning_maml_guard.lookahead.searches import Searches
from lightning_maml_guard.optim.snapshot import Snapshot
from lightning_maml_guard.stability.problems import PlainProblem


class Square(nn.Module):
    """Half a square, from 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def problem(self, more=0.0):
        return PlainProblem({"w": self.w}, lambda p: 0.5 * p["w"].square().sum() + more)


def test_a_search_is_made_once_for_each_place_and_batches():
    module, made, moves = Square(), [], [0]
    optimizer = SGD(module.parameters(), lr=0.1)

    def make(problems):
        made.append(RateSearch(Lookahead(problems, optimizer, 1), Scale(), 3.0, alpha_suspect=False))
        return made[-1]

    searches, batches = Searches(make, lambda: moves[0], module, [optimizer]), [module.problem()]
    early = Snapshot(module, [optimizer], 0)
    with torch.no_grad():
        module.w.fill_(3.0)
    here = searches.on(batches, alpha_suspect=True)
    assert here.reference == (4.5,) and here is searches.on(list(batches), alpha_suspect=True)
    # Another suspect, or number of steps, begins with what was run already.
    other = searches.on(batches, alpha_suspect=False, steps=7)
    assert other is not here and other.steps == 7 and other.lookahead is here.lookahead
    with searches.visited(early):
        there = searches.on(batches, alpha_suspect=True)
        assert there.reference == (0.5,) and there is not here
        with torch.no_grad():
            module.w.fill_(2.0)
        late = Snapshot(module, [optimizer], 5)
        with searches.visited(late):
            assert searches.on(batches, alpha_suspect=True).reference == (2.0,)
        assert searches.on(batches, alpha_suspect=True) is there
    with searches.visited(None):
        assert searches.on(batches, alpha_suspect=True) is here
    assert len(made) == 3
    # Other batches are others, and so is the run itself once it was moved.
    assert searches.on([module.problem(1.0)], alpha_suspect=True).reference == (5.5,)
    moves[0] += 1
    assert searches.on(batches, alpha_suspect=True) is not here and len(made) == 5
