"""Omniglot(download=True) against a server on this machine that breaks off, lies, or is not there."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from lightning_maml_guard.tasks import omniglot
from lightning_maml_guard.tasks.download import download
from lightning_maml_guard.tasks.images import DatasetError, Omniglot
from tests.tasks.test_images import folders, zipped  # noqa: F401  (a fixture)


class Files(BaseHTTPRequestHandler):
    """Serves ranges of ``server.files``; after ``server.breaks_at`` bytes of one it closes the connection, once."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")
        start, end = int(wanted[0]), min(int(wanted[1] or len(data)) + 1, len(data))
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(end - start))
        self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        self.end_headers()
        if body:
            self.server.asked.append((self.path, start))
            if self.server.breaks_at is not None and end > self.server.breaks_at:
                end, self.server.breaks_at = self.server.breaks_at, None
            self.wfile.write(data[start:end])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("lightning_maml_guard.tasks.download._BLOCK", 1000)
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as found:
        found.files, found.asked, found.breaks_at = {}, [], None
        found.url = f"http://127.0.0.1:{found.server_port}"
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield found
        found.shutdown()


def md5(data):
    return hashlib.md5(data).hexdigest()


def test_omniglot_is_downloaded_once_and_decoded(server, folders, tmp_path, monkeypatch, capsys):  # noqa: F811
    (tmp_path / "served").mkdir()
    for path in zipped(folders, tmp_path / "served", "{}.zip").iterdir():
        server.files[f"/{path.name}"] = path.read_bytes()
    monkeypatch.setattr(omniglot, "_AUTHORS", server.url)
    sums = {name.strip("/").removesuffix(".zip"): md5(data) for name, data in server.files.items()}
    monkeypatch.setattr(omniglot, "_PARTS", dict(sorted(sums.items())))
    family = Omniglot(str(tmp_path / "new" / "data"), n_way=2, download=True)
    family.setup()
    assert np.array_equal(family._images.squeeze(1).numpy(), omniglot.load_omniglot(folders).reshape(-1, 28, 28))
    assert "downloading omniglot_images_background.zip: 100%" in capsys.readouterr().err
    asked = len(server.asked)
    Omniglot(str(tmp_path / "new" / "data"), n_way=2, download=True).setup()
    assert len(server.asked) == asked


def test_a_download_that_broke_off_is_continued(server, tmp_path):
    data = server.files["/a.zip"] = np.random.default_rng(0).bytes(5500)
    server.breaks_at = 2500
    target = tmp_path / "a.zip"
    with pytest.raises(
        DatasetError, match=r"a\.zip could not be downloaded .*what has arrived is kept in .*a\.zip\.part"
    ):
        download(f"{server.url}/a.zip", target, md5(data))
    assert not target.exists() and (tmp_path / "a.zip.part").read_bytes() == data[:2000]
    server.asked.clear()
    download(f"{server.url}/a.zip", target, md5(data))
    assert target.read_bytes() == data and [start for _, start in server.asked] == [2000, 3000, 4000, 5000]
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


def test_another_file_is_removed(server, tmp_path):
    server.files["/a.zip"] = b"<html>log in first</html>"
    with pytest.raises(DatasetError, match=f"its MD5 is not {md5(b'a')}. It was removed"):
        download(f"{server.url}/a.zip", tmp_path / "a.zip", md5(b"a"))
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_reached_is_said(server, tmp_path):
    with pytest.raises(
        DatasetError, match="nothing.zip could not be downloaded .ClientResponseError: 404.*Try again. Or"
    ):
        download(f"{server.url}/nothing.zip", tmp_path / "a.zip", "")
    with pytest.raises(DatasetError, match="could not be downloaded .ClientConnectorError: Cannot connect.*save it as"):
        download("http://127.0.0.1:9/a.zip", tmp_path / "a.zip", "")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_to_is_said(server, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="could not be downloaded .FileExistsError: .*Try again. Or download it"):
        download(f"{server.url}/a.zip", tmp_path / "file" / "a.zip", "")
