import logging
import os
import sys
from pathlib import Path

import pytest
import torch

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
torch.set_num_threads(1)
# Of subprocesses: on cores that are taken, threads that wait for one another take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["LMG_VECTORIZE"] = "rule"  # no choice that a clock makes
# The real data sets: $LMG_DATA, or shared/data beside the project. Read here, as `elsewhere` sets the variable.
DATA = Path(os.environ.get("LMG_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    if not (DATA / "omniglot.npz").is_file():
        pytest.skip(f"no data sets in {DATA}; set LMG_DATA")
    return DATA


@pytest.fixture(scope="session")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("caches")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch, caches):
    """A working folder and caches of its own, for what writes into them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMG_DATA", os.environ.get("LMG_DATA", "data"))  # so that what --data sets ends with the test
    monkeypatch.setenv("XDG_CACHE_HOME", str(caches))  # decoded images: once a session, not into the user's home
    return tmp_path


@pytest.fixture
def applied(monkeypatch):
    """Rates that reach the update itself, one list an optimizer; a double that tries a step has other parameters."""
    found, kept = {}, []  # kept, so that no other parameter gets the id of one that is gone
    for name in ("sgd", "adam"):
        module = sys.modules[f"torch.optim.{name}"]  # hidden in torch.optim by the function

        original = getattr(module, name)

        def update(params, *args, lr, original=original, **kwargs):
            if id(params[0]) in found:
                found[id(params[0])].append(float(lr))
            original(params, *args, lr=lr, **kwargs)

        monkeypatch.setattr(module, name, update)

    def of(parameter):
        kept.append(parameter)
        return found.setdefault(id(parameter), [])

    return of
