"""Files made to do harm: nothing in them is run, and nothing outside their folder is read or written."""

import ast
import io
import pickle
import stat
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import lightning_maml_guard
from lightning_maml_guard import ConvergenceGuard, LookaheadOptions, MetaLearningModule
from lightning_maml_guard.cli.main import main
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.images import DatasetError, Omniglot, load_omniglot
from lightning_maml_guard.utils.lightning_compat import Trainer
from tests.helpers import fit

BATCH = ((torch.ones(2, 5, 1), torch.zeros(2, 5, 1)),) * 2
IMAGES = np.zeros((13, 20, 28, 28), np.uint8)


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def crater(tmp_path):
    """The file a bomb would write; a test in which it appears has failed."""
    path = tmp_path / "crater"
    yield path
    assert not path.exists(), "code from a file was run"


@pytest.fixture
def root(tmp_path):
    """The data folder; whatever lies beside it must be as before."""
    folder = tmp_path / "a" / "b" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "secret").write_text("do not read me")
    before = sorted(path for path in tmp_path.rglob("*") if folder not in path.parents)
    yield folder
    assert sorted(path for path in tmp_path.rglob("*") if folder not in path.parents) == before
    assert (tmp_path / "secret").read_text() == "do not read me"


def png():
    stream = io.BytesIO()
    Image.new("1", (28, 28), 1).save(stream, "PNG")
    return stream.getvalue()


def archive(root, members):
    with zipfile.ZipFile(root / "omniglot_images_background.zip", "w") as target:
        for member, data in members:
            target.writestr(member, data)


def test_a_bomb_goes_off_where_pickles_are_loaded(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "crater")))
    assert (tmp_path / "crater").exists()  # so its absence below means something


@pytest.mark.parametrize("name", ["images", "labels"])
def test_a_pickle_in_an_npz_is_not_loaded(root, crater, name):
    arrays = {"images": IMAGES, "labels": np.array(["a/b"] * 13), name: np.array([Bomb(crater)] * 13, dtype=object)}
    np.savez(root / "omniglot.npz", **arrays)
    if name == "labels":
        assert load_omniglot(root).shape == IMAGES.shape  # read by nobody
        return
    with pytest.raises(DatasetError, match=r"omniglot\.npz is damaged \(Object arrays cannot be loaded.*Copy it anew"):
        load_omniglot(root)


def test_a_pickle_called_npz_is_not_loaded(root, crater):
    (root / "omniglot.npz").write_bytes(pickle.dumps(Bomb(crater)))
    with pytest.raises(DatasetError, match=r"omniglot\.npz is damaged.*Copy it anew"):
        load_omniglot(root)


@pytest.mark.parametrize("label", ["../../../secret", "/etc/passwd", "..\\..\\secret"])
def test_labels_of_an_npz_are_no_paths(root, label):
    np.savez(root / "omniglot.npz", images=IMAGES, labels=np.array([label] * 13))
    family = Omniglot(root=str(root), n_way=1)
    family.setup()
    assert sum(len(each) for each in family._classes.values()) == 13


@pytest.mark.parametrize(
    "folder",
    ["../../..", "/tmp/lmg-escape", "..\\..\\..", "C:\\lmg-escape", "images_background/../../../.."],
)
def test_members_of_a_zip_do_not_leave_it(root, folder):
    archive(root, [(f"{folder}/crater/{drawer:02d}.png", png()) for drawer in range(20)])
    assert load_omniglot(root).shape == (1, 20, 28, 28)
    assert [path.name for path in root.iterdir()] == ["omniglot_images_background.zip"]
    assert not Path("/tmp/lmg-escape").exists()


def test_a_symlink_in_a_zip_is_not_followed(root):
    link = zipfile.ZipInfo("images_background/Alphabet/character01/0001_01.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    archive(root, [(link, "../../../../secret")])
    with pytest.raises(
        DatasetError, match=r"The image images_background/Alphabet/character01/0001_01\.png is damaged"
    ) as caught:
        load_omniglot(root)
    assert "do not read me" not in str(caught.value)


def test_an_encrypted_member_is_named(root):
    archive(root, [("images_background/A/character01/0001_01.png", png())])
    path = root / "omniglot_images_background.zip"
    data = bytearray(path.read_bytes())
    for mark, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flag that says so, in both headers
        data[data.index(mark) + at] |= 1
    path.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match=r"is damaged .*encrypted.*Download or copy it again"):
        load_omniglot(root)


def test_what_only_looks_like_an_image_runs_no_interpreter(root, monkeypatch):
    called = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **options: called.append(arguments))
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 28 28\n%%EndComments\n(crater) (w) file\n%%EOF\n"
    with Image.open(io.BytesIO(script)) as guessed:
        assert guessed.format == "EPS"  # what Pillow makes of it when asked to guess
    archive(root, [("images_background/A/character01/0001_01.png", script)])
    with pytest.raises(DatasetError, match=r"0001_01\.png is damaged"):
        load_omniglot(root)
    assert called == []


def test_an_image_that_would_fill_the_memory_is_refused(root):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    archive(root, [("images_background/A/character01/0001_01.png", b"\x89PNG\r\n\x1a\n" + chunks)])
    with pytest.raises(DatasetError, match=r"0001_01\.png is damaged .*decompression bomb"):
        load_omniglot(root)


@pytest.mark.parametrize("number", [np.float32, np.float64])
def test_checkpoints_hold_no_code(tmp_path, number):
    """What a Trainer writes of module and guard, and the guard's own state, load without the unpickler's powers."""
    module = MetaLearningModule(mlp(hidden=(3,)), inner_lr=number(0.5), learn_inner_lr=True)
    guard = ConvergenceGuard(
        every_n_steps=1,
        action="rescale",
        margin=number(0.5),
        rollback=True,
        lookahead=LookaheadOptions(divergence_ratio=number(3)),
    )
    trainer = fit(module, BATCH, 3, [guard])
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    torch.save(guard.state_dict(), tmp_path / "guard.pt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["inner_lr"] == 0.5 and guard.state_key in checkpoint["callbacks"]
    state = torch.load(tmp_path / "guard.pt", weights_only=True)
    assert len(state["history"]) == 3
    again = ConvergenceGuard(
        every_n_steps=1,
        action="rescale",
        margin=number(0.5),
        rollback=True,
        lookahead=LookaheadOptions(divergence_ratio=number(3)),
    )
    again.load_state_dict(state)
    assert [report.step for report in again.history] == [0, 1, 2]
    restored = MetaLearningModule.load_from_checkpoint(tmp_path / "run.ckpt", network=mlp(hidden=(3,)))
    assert all(torch.equal(a, b) for a, b in zip(restored.parameters(), module.parameters(), strict=True))


def test_a_checkpoint_with_code_is_refused(tmp_path, crater):
    module = MetaLearningModule(mlp(hidden=(3,)))
    trainer = fit(module, BATCH, 1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    checkpoint = torch.load(tmp_path / "run.ckpt", weights_only=True)
    torch.save({**checkpoint, "inner_lr_cap": Bomb(crater)}, tmp_path / "hostile.ckpt")
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        MetaLearningModule.load_from_checkpoint(tmp_path / "hostile.ckpt", network=mlp(hidden=(3,)))
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        Trainer(accelerator="cpu", max_steps=1, **quiet).fit(module, [BATCH], ckpt_path=str(tmp_path / "hostile.ckpt"))


def test_a_configuration_with_code_is_refused(tmp_path, crater):
    path = tmp_path / "hostile.yaml"
    path.write_text(
        f"trainer: !!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{crater}']]\n"
    )
    with pytest.raises(SystemExit):
        main(["--config", str(path)])


FORBIDDEN = {"eval", "exec", "extract", "extractall", "unpack_archive", "unsafe_load", "full_load", "read_pickle"}
SAFE = {("torch", "load"): ("weights_only", True), ("np", "load"): ("allow_pickle", False)}


def called(node):
    """``(owner, name)`` of a call."""
    if isinstance(node.func, ast.Attribute):
        return getattr(node.func.value, "id", ""), node.func.attr
    return "", getattr(node.func, "id", "")


def unsafe(tree):
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [alias.name for alias in node.names] + [getattr(node, "module", "") or ""]
            yield from (
                name for name in names if name.split(".")[0] in {"pickle", "dill", "joblib", "shelve", "marshal"}
            )
        elif isinstance(node, ast.Call):
            owner, name = called(node)
            given = {word.arg: getattr(word.value, "value", None) for word in node.keywords}
            keyword, value = SAFE.get((owner, name), (None, None))
            # `eval` of a module is its mode; the builtin has no owner.
            if (name in FORBIDDEN and not (owner and name in {"eval", "exec"})) or (
                keyword and given.get(keyword) is not value
            ):
                yield f"{owner}.{name}"


def test_no_file_is_read_in_a_way_that_could_run_it():
    """Every reader that is written from now on is held to it, too."""
    package = Path(lightning_maml_guard.__file__).parent
    found = {str(path): list(unsafe(ast.parse(path.read_text()))) for path in package.rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "torch.load(path, weights_only=False)",
        "np.load(path)", "np.load(path, allow_pickle=True)", "archive.extractall(folder)", "yaml.unsafe_load(text)", "eval(text)",
    ],
)  # fmt: skip
def test_that_test_sees_what_it_looks_for(code):
    assert list(unsafe(ast.parse(code)))
