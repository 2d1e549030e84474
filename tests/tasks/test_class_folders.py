"""miniImageNet and class folders: what is read, what is cached, what is refused."""

import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_maml_guard import GuardWarning, TaskDataModule
from lightning_maml_guard.tasks.episodes import SPLITS, episode_generator
from lightning_maml_guard.tasks.images import ClassFolders, DatasetError, MiniImageNet

CLASSES = {"train": 6, "val": 5, "test": 5}
PER_CLASS = 8


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lightning_maml_guard"


def colour(label: int, index: int) -> tuple[int, int, int]:
    return 10 * label, 20 * index, 7


def paint(path, label, index, size=84):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour(label, index)).save(path, format="PNG")


@pytest.fixture
def mini(tmp_path):
    """A miniImageNet of plain colours; PNG bytes, so that the colours can be read back exactly."""
    root = tmp_path / "data" / "miniImagenet"
    label = 0
    for split in SPLITS:
        rows = ["filename,label"]
        for _ in range(CLASSES[split]):
            for index in range(PER_CLASS):
                name = f"n{label:04d}{index:04d}.jpg"
                paint(root / "images" / name, label, index)
                rows.append(f"{name},n{label:04d}")
            label += 1
        (root / f"{split}.csv").write_text("\n".join(rows) + "\n")
    return root


def zipped(root, target):
    with zipfile.ZipFile(target, "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root.parent))
    return target


def family(root, **arguments):
    return MiniImageNet(str(root), n_way=5, k_shot=2, queries=3, **arguments)


def caches(folder):
    return sorted(folder.glob("*.npy")) if folder.is_dir() else []


def test_an_episode_holds_five_classes_of_its_split_and_no_image_twice(mini):
    found = family(mini)
    offset = 0
    for split in SPLITS:
        (xs, ys), (xq, yq) = found.sample(3, episode_generator(0, split, 0), split)
        assert xs.shape == (3, 10, 3, 84, 84) and xq.shape == (3, 15, 3, 84, 84)
        for task in range(3):
            seen = set()
            owner = {}
            for x, y in [*zip(xs[task], ys[task], strict=True), *zip(xq[task], yq[task], strict=True)]:
                red, green, blue = (x[:, 0, 0] * 255).round().int().tolist()
                assert bool((x == x[:, :1, :1]).all()) and blue == 7
                assert owner.setdefault(int(y), red // 10) == red // 10
                assert (red, green) not in seen
                seen.add((red, green))
            assert len(set(owner.values())) == 5
            assert all(offset <= label < offset + CLASSES[split] for label in owner.values())
        offset += CLASSES[split]


def test_folder_and_zip_give_the_same_episodes(mini, tmp_path):
    other = tmp_path / "zipped"
    other.mkdir()
    zipped(mini, other / "mini-ImageNet_small.zip")
    one, two, three = (family(root) for root in (mini.parent, other, other / "mini-ImageNet_small.zip"))
    batches = [each.sample(2, episode_generator(1, "train", 5)) for each in (one, two, three)]
    for batch in batches[1:]:
        assert torch.equal(batch.support[0], batches[0].support[0]) and torch.equal(batch.query[1], batches[0].query[1])


def test_it_is_decoded_once_beside_the_data_and_anew_when_the_source_changes(mini, monkeypatch):
    beside = mini.parent / ".lmg_cache"
    family(mini).setup()
    (first,) = caches(beside)
    assert not list(beside.glob("*.part"))
    monkeypatch.setattr("lightning_maml_guard.tasks.image_cache.decode", lambda *_: pytest.fail("decoded twice"))
    family(mini).setup()
    monkeypatch.undo()
    victim = mini / "images" / "n00000000.jpg"
    paint(victim, 24, 12)
    again = family(mini)
    again.setup()
    (second,) = caches(beside)
    assert second != first and again._images[0, :, 0, 0].tolist() == list(colour(24, 12))


def test_a_data_module_decodes_before_the_processes_of_a_machine_set_up(mini, monkeypatch):
    TaskDataModule(family(mini)).prepare_data()  # Lightning's hook of one process per machine
    monkeypatch.setattr("lightning_maml_guard.tasks.image_cache._decode", None)
    TaskDataModule(family(mini)).setup("fit")


def test_a_missing_pillow_is_said_before_anything_is_decoded(mini, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ModuleNotFoundError, match=r"decoded by Pillow.*pip install 'lightning-maml-guard\[examples\]'"):
        family(mini).setup()
    assert "decoding" not in capsys.readouterr().err


def test_the_users_cache_is_used_where_the_data_is_read_only(mini, cache_home):
    os.chmod(mini.parent, 0o555)
    try:
        family(mini).setup()
    finally:
        os.chmod(mini.parent, 0o755)
    assert len(caches(cache_home)) == 1 and not (mini.parent / ".lmg_cache").exists()


def test_nowhere_to_write_is_said(mini, cache_home, monkeypatch):
    cache_home.parent.mkdir(parents=True)
    cache_home.write_text("a file where the folder should be")
    (mini.parent / ".lmg_cache").write_text("here too")
    with pytest.raises(PermissionError, match="can be written neither to .* nor to .*XDG_CACHE_HOME"):
        family(mini).setup()


def test_a_damaged_cache_is_said_and_made_anew(mini):
    family(mini).setup()
    (path,) = caches(mini.parent / ".lmg_cache")
    for damage in (b"no array", path.read_bytes()[:5000]):
        path.unlink()
        path.write_bytes(damage)
        with pytest.warns(GuardWarning, match=r"The cache .*npy is damaged .*decoding the images again"):
            again = family(mini)
            again.setup()
        assert again._images[9, :, 5, 5].tolist() == list(colour(1, 1))


def test_a_damaged_image_is_named_and_leaves_no_cache(mini):
    (mini / "images" / "n00030002.jpg").write_bytes(b"no image")
    with pytest.raises(DatasetError, match=r"The image images/n00030002\.jpg of .*miniImagenet is damaged"):
        family(mini).setup()
    assert os.listdir(mini.parent / ".lmg_cache") == []


def test_a_damaged_archive_is_named(mini, tmp_path):
    archive = zipped(mini, tmp_path / "mini.zip")
    data = bytearray(archive.read_bytes())
    at = data.index(b"IHDR")
    data[at : at + 12] = bytes(12)
    archive.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match=r"miniImagenet/images/n00000000\.jpg.*damaged"):
        family(archive).setup()
    archive.write_bytes(b"no zip")
    with pytest.raises(DatasetError, match=r"mini\.zip is damaged"):
        family(archive).setup()


@pytest.mark.parametrize("name", ["../secret.jpg", "/etc/passwd", "..\\secret.jpg", "a/b.jpg", "..", "C:x.jpg"])
def test_a_name_that_leaves_the_folder_is_refused(mini, name):
    paint(mini / "secret.jpg", 1, 1)
    with (mini / "val.csv").open("a") as stream:
        stream.write(f'"{name}",n0006\n')
    with pytest.raises(DatasetError, match=r"Line 42 of val\.csv of .* names .*only plain file names"):
        family(mini).setup()


def test_what_is_wrong_with_a_split_file_is_said(mini):
    good = (mini / "val.csv").read_text()
    for content, message in (
        ("a,b\n1,2\n", "no rows with the columns filename and label"),
        (good + "n99.jpg,n0006\n", r"names 'n99\.jpg', which is not in its folder images/"),
        (good + ",n0006\n", "lacks its filename or label"),
        (good + "n00000000.jpg,n0000\n", "'n0000' is in train and in val"),
        (b"\xff\xfe\xfa", r"val\.csv of .* is damaged"),
    ):
        (mini / "val.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(DatasetError, match=message):
            family(mini).setup()
    (mini / "val.csv").unlink()
    with pytest.raises(DatasetError, match=r"lacks val\.csv of miniImageNet. Put there"):
        family(mini).setup()


def test_a_missing_or_ambiguous_data_set_is_said(mini, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(
        DatasetError,
        match=r"miniImageNet was not found in .*Put there .*LMG_DATA=/path.*Ask for them at https://image-net\.org",
    ):
        MiniImageNet(str(empty)).setup()
    for name in ("miniimagenet.zip", "mini-imagenet-100.zip"):
        zipped(mini, empty / name)
    with pytest.raises(DatasetError, match=r"Several archives .*mini-imagenet-100\.zip, miniimagenet\.zip"):
        MiniImageNet(str(empty)).setup()


def test_class_folders_may_differ_in_size_and_are_split_by_shares(tmp_path):
    for label in range(10):
        for index in range(4 + label):
            paint(tmp_path / "birds" / f"class{label}" / f"{index}.{'PNG' if index else 'jpeg'}", label, index, size=40)
    found = ClassFolders(str(tmp_path / "birds"), n_way=2, k_shot=1, queries=3, image_size=32, shares=(0.5, 0.2, 0.3))
    found.setup()
    assert sorted(found._counts.tolist()) == list(range(4, 14))
    assert [len(found._classes[split]) for split in SPLITS] == [5, 2, 3]
    assert len(torch.cat(list(found._classes.values())).unique()) == 10
    seen = set()
    for index in range(60):
        (xs, _), (xq, _) = found.sample(2, episode_generator(0, "train", index))
        assert xs.shape == (2, 2, 3, 32, 32)
        seen |= {tuple((x[:2, 3, 3] * 255).round().int().tolist()) for x in torch.cat([xs, xq], 1).flatten(0, 1)}
    labels = {red // 10 for red, _ in seen}
    assert len(labels) == 5
    for label in labels:  # every image is drawn, and none of another class
        assert sorted(green // 20 for red, green in seen if red == 10 * label) == list(range(4 + label))


def test_class_folders_of_their_own_splits_in_grey_and_from_a_zip(tmp_path):
    for label, split in enumerate(("train", "train", "val", "val", "test", "test")):
        for index in range(3):
            paint(tmp_path / "set" / split / f"c{label}" / f"{index}.jpg", label, index)
    arguments = {"n_way": 2, "k_shot": 1, "queries": 2, "image_size": 16, "channels": 1}
    found = ClassFolders(str(tmp_path / "set"), **arguments)
    batch = found.sample(1, episode_generator(0, "val", 0), "val")
    assert batch.support[0].shape == (1, 2, 1, 16, 16)
    assert {split: c.tolist() for split, c in found._classes.items()} == {
        "train": [0, 1],
        "val": [2, 3],
        "test": [4, 5],
    }
    other = ClassFolders(str(zipped(tmp_path / "set", tmp_path / "set.zip")), **arguments)
    assert torch.equal(other.sample(1, episode_generator(0, "val", 0), "val").support[0], batch.support[0])


def test_class_folders_refuse_what_they_cannot_serve(tmp_path):
    with pytest.raises(DatasetError, match="No class folders with images were found"):
        ClassFolders(str(tmp_path)).setup()
    with pytest.raises(ValueError, match=r"`shares` to be 3 finite numbers of at least 0.* but got \(1, 2\)"):
        ClassFolders(str(tmp_path), shares=(1, 2))
    with pytest.raises(ValueError, match="`channels` to be 3 .* but got 2"):
        ClassFolders(str(tmp_path), channels=2)
    for label in range(3):
        paint(tmp_path / f"class{label}" / "0.png", label, 0)
    with pytest.raises(ValueError, match="n_way=5 classes but this split has 2"):
        ClassFolders(str(tmp_path)).setup()


def test_images_move_to_the_device_that_trains(mini):
    """The meta device stands for a GPU: it says where each tensor would be made."""
    found = family(mini)
    found.to(torch.device("meta"))
    (x, y), _ = found.sample(2, episode_generator(0, "train", 0))
    assert x.device.type == y.device.type == "meta" and x.shape == (2, 10, 3, 84, 84)


def test_the_data_module_hands_its_device_over(mini):
    from types import SimpleNamespace

    found = family(mini)
    for workers, device in ((2, "cpu"), (0, "meta")):
        module = TaskDataModule(found, num_workers=workers)
        module.trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
        module.setup("fit")
        assert found._images.device.type == device


def test_the_real_archive(data_folder):
    found = MiniImageNet(str(data_folder), n_way=5, k_shot=5, queries=15)
    (xs, ys), (xq, _) = found.sample(2, episode_generator(0, "test", 0), "test")
    assert (
        xs.shape == (2, 25, 3, 84, 84) and xq.shape == (2, 75, 3, 84, 84) and ys[0].tolist() == sorted(ys[0].tolist())
    )
    assert 0.2 < float(xs.mean()) < 0.7 and {s: len(c) for s, c in found._classes.items()} == {
        "train": 64, "val": 16, "test": 20,
    }  # fmt: skip
    with zipfile.ZipFile(data_folder / "miniimagenet_100per.zip") as archive:
        name = next(n for n in sorted(archive.namelist()) if n.endswith(".jpg"))
        with archive.open(name) as stream:
            first = np.asarray(Image.open(stream).convert("RGB"))
    assert np.array_equal(found._images[0].permute(1, 2, 0).numpy(), first)
