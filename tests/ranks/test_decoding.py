import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.ranks.test_ranks import ROOT


@pytest.mark.slow
def test_two_processes_decode_every_image_once(tmp_path):
    for label in range(6):
        (tmp_path / "data" / str(label)).mkdir(parents=True)
        for number in range(4):
            Image.fromarray(np.full((28, 28, 3), number, np.uint8)).save(
                tmp_path / "data" / str(label) / f"{number}.png"
            )
    command = [sys.executable, "-m", "tests.ranks.decoding", tmp_path / "data", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(int((tmp_path / f"rank{rank}").read_text()) for rank in range(2)) == [0, 24]
