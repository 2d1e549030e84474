"""Files are written whole or not at all; a fingerprint depends on all of the contents."""

import errno
import os

import numpy as np
import pytest
import torch

from lightning_maml_guard.utils.io import fingerprint, out_of_room, replacing, reserve, write_atomically


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


def test_text_that_utf_8_cannot_hold_is_escaped(tmp_path):
    write_atomically(tmp_path / "file", "caf\udce9 grün")
    assert (tmp_path / "file").read_text(encoding="utf-8") == "caf\\udce9 grün"


@pytest.mark.parametrize("missing", [None, errno.EOPNOTSUPP, AttributeError])
def test_room_is_taken_from_the_position_on(tmp_path, monkeypatch, missing):
    """With posix_fallocate, without it, and on a file system that lacks it."""
    if missing is AttributeError:
        monkeypatch.delattr(os, "posix_fallocate")
    elif missing:
        monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(missing, "not here")))
    path = tmp_path / "file"
    with path.open("wb") as stream:
        stream.write(b"head")
        reserve(stream, 3_000_001)
        status = path.stat()
        assert status.st_size == 3_000_005 and status.st_blocks * 512 >= 3_000_005 and stream.tell() == 4
        stream.write(b"body")
    assert path.read_bytes()[:10] == b"headbody\0\0"


def test_no_room_is_told_from_other_errors():
    assert all(out_of_room(OSError(each, "")) for each in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
    assert not any(out_of_room(OSError(each, "")) for each in (errno.EACCES, errno.EIO, errno.ENOENT))


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
