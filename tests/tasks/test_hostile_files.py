"""Files made to do harm: nothing in them is run, and nothing outside their folder is read or written."""

import ast
import io
import multiprocessing
import os
import pickle
import resource
import stat
import struct
import subprocess
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
from lightning_maml_guard.tasks.image_files import LARGEST
from lightning_maml_guard.tasks.images import ClassFolders, DatasetError, MiniImageNet, Omniglot, load_omniglot
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
    assert {path.name for path in root.iterdir()} == {"omniglot_images_background.zip", ".lmg_cache"}
    assert [path.suffix for path in (root / ".lmg_cache").iterdir()] == [".npy"]
    assert not Path("/tmp/lmg-escape").exists()


def test_a_symlink_in_a_zip_is_not_followed(root):
    link = zipfile.ZipInfo("images_background/Alphabet/character01/0001_01.png")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    archive(root, [(link, "../../../../secret")])
    with pytest.raises(
        DatasetError, match=r"The image images_background/Alphabet/character01/0001_01\.png of .*\.zip is damaged"
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
    with pytest.raises(DatasetError, match=r"0001_01\.png of .*\.zip is damaged"):
        load_omniglot(root)
    assert called == []


def test_an_image_that_would_fill_the_memory_is_refused(root):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)
    chunks = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    )
    archive(root, [("images_background/A/character01/0001_01.png", b"\x89PNG\r\n\x1a\n" + chunks)])
    with pytest.raises(DatasetError, match=r"0001_01\.png of .*\.zip is damaged .*decompression bomb"):
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


def classes(root, size=2):
    """Folders of four classes of two images."""
    for index in range(8):
        path = root / f"c{index // 2}" / f"{index % 2}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (size, size), (30 * index, 0, 0)).save(path)
    return root


def folders(root, **arguments):
    shares = (0.5, 0.25, 0.25)
    return ClassFolders(str(root), **{"n_way": 1, "k_shot": 1, "queries": 1, "shares": shares, **arguments})


def outcome(family, limit=None, seconds=10):
    """What loading says, in a process of its own: what a signal ends, or what hangs, fails the test alone."""

    def load(said):
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            family.setup()
            said.send("loaded")
        except Exception as error:
            said.send(f"{type(error).__name__}: {error}")

    context = multiprocessing.get_context("fork")
    heard, said = context.Pipe(duplex=False)
    process = context.Process(target=load, args=(said,))
    process.start()
    process.join(seconds)
    hangs = process.is_alive()
    if hangs:
        process.kill()
        process.join()
    assert not hangs, "it hangs"
    assert process.exitcode == 0, f"a signal ended Python: {process.exitcode}"
    return heard.recv()


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lightning_maml_guard"


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 256 kB."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"no disk can be mounted here: {mounted.stderr.decode()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def files_of(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("reserves", [True, False])
def test_where_the_disk_is_full_the_next_folder_takes_the_images(small_disk, cache_home, monkeypatch, reserves):
    if not reserves:  # as on macOS
        monkeypatch.delattr(os, "posix_fallocate")
    root = classes(small_disk / "set")
    assert outcome(folders(root, image_size=128)) == "loaded"  # 8 * 3 * 128^2 bytes = 393 kB
    assert files_of(small_disk / ".lmg_cache") == [] and len(files_of(cache_home)) == 1
    assert outcome(folders(root, image_size=64)) == "loaded"  # 98 kB
    assert len(files_of(small_disk / ".lmg_cache")) == 1 and len(files_of(cache_home)) == 1


def test_what_the_other_folder_holds_is_what_was_decoded(small_disk, cache_home):
    root = classes(small_disk / "set", size=128)
    family = folders(root, image_size=128)
    assert outcome(family) == "loaded"
    family.setup()  # maps what that process decoded
    assert family._images.shape == (8, 3, 128, 128)
    reds = family._images[:, 0].flatten(1)
    assert bool((reds == reds[:, :1]).all()) and sorted(reds[:, 0].tolist()) == [30 * index for index in range(8)]


def test_a_disk_that_fills_up_meanwhile_is_a_full_one(small_disk, cache_home, monkeypatch):
    monkeypatch.setattr("lightning_maml_guard.tasks.image_cache.reserve", lambda stream, size: None)
    assert outcome(folders(classes(small_disk / "set"), image_size=128)) == "loaded"
    assert files_of(small_disk / ".lmg_cache") == [] and len(files_of(cache_home)) == 1


def test_no_room_anywhere_is_said_in_one_line(tmp_path, cache_home):
    root = classes(tmp_path / "set")
    said = outcome(folders(root, image_size=256), limit=1_000_000)
    assert said == (
        f"OSError: The decoded images of {root} can be written neither to {tmp_path / '.lmg_cache'} (no room for "
        f"1.6 MB) nor to {cache_home} (no room for 1.6 MB). Let XDG_CACHE_HOME name a folder that can be written to, "
        "with 1.6 MB free."
    )
    assert files_of(tmp_path / ".lmg_cache") == files_of(cache_home) == []


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere.png"), lambda p: p.symlink_to(p)])
def test_what_is_no_regular_file_is_no_image(tmp_path, cache_home, make):
    root = classes(tmp_path / "set")
    for name in ("notes.txt", ".#0.png"):  # an editor's lock is a link that leads nowhere
        make(root / "c0" / name)
    (root / "c0" / "2.png").symlink_to(root / "c0" / "1.png")  # a link to a file is one
    assert outcome(folders(root)) == "loaded"
    make(root / "c0" / "3.png")
    said = outcome(folders(root))
    assert said.startswith(f"DatasetError: c0/3.png in {root} is no regular file") and "Remove it" in said


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_regular_file_is_no_archive(tmp_path, make):
    make(tmp_path / "miniimagenet.zip")
    assert outcome(MiniImageNet(str(tmp_path))).startswith("DatasetError: miniImageNet was not found in")


def test_a_member_that_would_fill_the_memory_is_not_unpacked(tmp_path, cache_home, monkeypatch):
    zeros = bytes(1 << 20)
    with zipfile.ZipFile(tmp_path / "set.zip", "w", zipfile.ZIP_DEFLATED) as target:
        with target.open("c0/0.png", "w") as member:
            for _ in range(LARGEST // len(zeros) + 1):
                member.write(zeros)
        target.writestr("c1/0.png", png())
    assert (tmp_path / "set.zip").stat().st_size < 1_000_000
    monkeypatch.setattr(zipfile.ZipFile, "read", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(DatasetError, match=r"c0/0\.png in .*set\.zip holds 135 MB, .* more than 134 MB are not read"):
        folders(tmp_path / "set.zip", queries=1, k_shot=1).setup()


def test_a_file_that_would_fill_the_memory_is_not_read(tmp_path, cache_home):
    root = classes(tmp_path / "set")
    with (root / "c0" / "0.png").open("wb") as stream:
        stream.truncate(10**12)  # takes no room on the disk
    with pytest.raises(DatasetError, match=r"c0/0\.png in .*set holds 1000000 MB, .*Remove it"):
        folders(root).setup()


def test_an_npz_that_would_fill_the_memory_is_not_read(root):
    header = {"descr": "|u1", "fortran_order": False, "shape": (8600, 20, 28, 28)}
    with (
        zipfile.ZipFile(root / "omniglot.npz", "w", zipfile.ZIP_DEFLATED) as target,
        target.open("images.npy", "w") as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)
        for _ in range(8600):
            member.write(bytes(20 * 28 * 28))
    with pytest.raises(DatasetError, match=r"^images\.npy in .*omniglot\.npz holds 135 MB"):
        load_omniglot(root)


def split_files(root, **rows):
    """A miniImageNet of 12 images, four of each split in two classes, with other rows where they are given."""
    (root / "images").mkdir()
    for number, split in enumerate(("train", "val", "test")):
        names = [f"{4 * number + index:02d}.png" for index in range(4)]
        for index, name in enumerate(names):
            Image.new("RGB", (2, 2), (20 * (4 * number + index), 0, 0)).save(root / "images" / name)
        own = "".join(f"{name},{split}{index % 2}\n" for index, name in enumerate(names))
        (root / f"{split}.csv").write_text("filename,label\n" + own + rows.get(split, ""))
    return MiniImageNet(str(root), n_way=2, k_shot=1, queries=1, image_size=2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"train": "01.png,train1\n"}, "Line 6 of train.csv of {root} names '01.png' with the label 'train1', which line 3 of train.csv named with 'train1'."),
        ({"train": "\n\n01.png,train0\n"}, "Line 8 of train.csv of {root} names '01.png' with the label 'train0', which line 3 of train.csv named with 'train1'."),
        ({"test": "07.png,test0\n"}, "Line 6 of test.csv of {root} names '07.png' with the label 'test0', which line 5 of val.csv named with 'val1'."),
    ],
)  # fmt: skip
def test_an_image_named_twice_is_refused_with_both_lines(tmp_path, cache_home, rows, message):
    """It would be in the support and in the query set of one episode, or in training and in test."""
    with pytest.raises(DatasetError) as caught:
        split_files(tmp_path, **rows).setup()
    assert str(caught.value).startswith(message.format(root=tmp_path)) and "remove one" in str(caught.value)


def test_three_million_lines_of_one_image_are_not_decoded(tmp_path, cache_home, monkeypatch):
    monkeypatch.setattr("lightning_maml_guard.tasks.image_cache.decode", lambda *_: pytest.fail("decoded"))
    family = split_files(tmp_path, train="00.png,train0\n" * 3_000_000)
    with pytest.raises(DatasetError, match=r"Line 6 of train\.csv .* line 2 of train\.csv"):
        family.setup()


def test_a_byte_order_mark_is_passed_over(tmp_path, cache_home):
    family = split_files(tmp_path)
    for split in ("train", "val", "test"):
        path = tmp_path / f"{split}.csv"
        path.write_text(path.read_text(), encoding="utf-8-sig")
    family.setup()
    assert family._images[:, 0, 0, 0].tolist() == [20 * i for i in (0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11)]
    assert {split: found.tolist() for split, found in family._classes.items()} == {
        "train": [0, 1], "val": [2, 3], "test": [4, 5],
    }  # fmt: skip


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


# Copies live objects in memory: it reads what it has just written there, and no file.
IN_MEMORY = {"optim/scheduler_copy.py": ["pickle"]}


def test_no_file_is_read_in_a_way_that_could_run_it():
    """Every reader that is written from now on is held to it, too."""
    package = Path(lightning_maml_guard.__file__).parent
    texts = {str(path.relative_to(package)): path.read_text() for path in package.rglob("*.py")}
    found = {name: list(unsafe(ast.parse(text))) for name, text in texts.items()}
    assert {name: each for name, each in found.items() if each} == IN_MEMORY
    for name in IN_MEMORY:
        tree = ast.parse(texts[name])
        calls = {called(node)[1] for node in ast.walk(tree) if isinstance(node, ast.Call)}
        assert "io.BytesIO" in texts[name] and not calls & {"open", "Path", "read_bytes", "urlopen"}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle", "from joblib import load", "torch.load(path)", "torch.load(path, weights_only=False)",
        "np.load(path)", "np.load(path, allow_pickle=True)", "archive.extractall(folder)", "yaml.unsafe_load(text)", "eval(text)",
    ],
)  # fmt: skip
def test_that_test_sees_what_it_looks_for(code):
    assert list(unsafe(ast.parse(code)))
