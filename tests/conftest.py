import logging
import os
from pathlib import Path

import pytest
import torch

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The real data sets: $LMG_DATA, or shared/data beside the project."""
    folder = Path(os.environ.get("LMG_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "omniglot.npz").is_file():
        pytest.skip(f"no data sets in {folder}; set LMG_DATA")
    return folder
