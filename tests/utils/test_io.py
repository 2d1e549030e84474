"""Files are written whole or not at all; a fingerprint depends on all of the contents."""

import numpy as np
import pytest
import torch

from lightning_maml_guard.utils.io import fingerprint, replacing, write_atomically


@pytest.mark.parametrize("content", ["grün", "grün".encode(), lambda stream: stream.write("grün".encode())])
def test_text_bytes_and_functions_are_written(tmp_path, content):
    path = tmp_path / "file.txt"
    path.write_text("old")
    write_atomically(path, content, mode=0o644)
    assert path.read_text(encoding="utf-8") == "grün"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_without_a_mode_the_file_is_the_users_own(tmp_path):
    write_atomically(tmp_path / "file", b"")
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


def test_after_an_error_the_old_file_is_there_and_no_other(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail(stream):
        stream.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_torch_and_numpy_write_to_the_stream(tmp_path):
    write_atomically(tmp_path / "a.pt", lambda stream: torch.save({"x": torch.ones(2)}, stream))
    write_atomically(tmp_path / "a.npz", lambda stream: np.savez_compressed(stream, x=np.ones(2)))
    assert torch.load(tmp_path / "a.pt", weights_only=True)["x"].tolist() == [1, 1]
    assert np.load(tmp_path / "a.npz")["x"].tolist() == [1, 1]


def test_fingerprints_tell_contents_dtypes_shapes_and_places_apart():
    x = torch.arange(4.0)
    parts = [
        (x,),
        (x.double(),),
        (x.reshape(2, 2),),
        (x.numpy(),),
        (x, None),
        ({"w": x, "b": x},),
        ("text",),
        ("te", "xt"),
        (1,),
        (1.0,),
        (),
    ]
    found = [fingerprint(*each) for each in parts]
    assert len(set(found)) == len(found)
    assert fingerprint(x.clone(), [1, "a"]) == fingerprint(x, [1, "a"])
