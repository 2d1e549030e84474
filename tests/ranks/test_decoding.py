import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.ranks.test_ranks import ROOT

# Images of the real archives (shared/data/README.md), and of the folders that the test makes.
IMAGES = {"folders": 24, "omniglot": 1623 * 20, "miniimagenet": 100 * 100}


@pytest.fixture
def folder(request, tmp_path):
    """A folder that holds one data set."""
    folder = tmp_path / "data"
    folder.mkdir()
    if request.param == "folders":
        for label in range(6):
            (folder / str(label)).mkdir()
            for number in range(4):
                image = Image.fromarray(np.full((28, 28, 3), number, np.uint8))
                image.save(folder / str(label) / f"{number}.png")
    else:
        for archive in request.getfixturevalue("data_folder").glob(f"{request.param}*.zip"):
            (folder / archive.name).symlink_to(archive)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("data", "folder"), [(name, name) for name in IMAGES], indirect=["folder"])
def test_two_processes_decode_every_image_once(data, folder, tmp_path):
    command = [sys.executable, "-m", "tests.ranks.decoding", data, folder, tmp_path]
    own = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(int((tmp_path / f"rank{rank}").read_text()) for rank in range(2)) == [0, IMAGES[data]]
