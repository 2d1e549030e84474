import io
import shutil
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_maml_guard.tasks.episodes import episode_generator
from lightning_maml_guard.tasks.images import DatasetError, Omniglot, data_root, load_omniglot

PARTS = {"images_background": 30, "images_evaluation": 10}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small Omniglot in its official layout: one ink square a character, at a place of its own."""
    root = tmp_path_factory.mktemp("omniglot")
    number = 0
    for part, characters in PARTS.items():
        for _ in range(characters):
            folder = root / part / f"Alphabet_{number // 10}" / f"character{number % 10:02d}"
            folder.mkdir(parents=True)
            for drawer in range(20):
                pixels = np.full((105, 105), 255, np.uint8)
                pixels[(number * 2) : (number * 2) + 8, drawer : drawer + 8] = 0
                Image.fromarray(pixels).convert("1").save(folder / f"{number:04d}_{drawer:02d}.png")
            number += 1
    return root


def zipped(folders, target, names="omniglot_{}.zip"):
    for part in PARTS:
        with zipfile.ZipFile(target / names.format(part), "w") as archive:
            for path in sorted((folders / part).rglob("*.png")):
                archive.write(path, path.relative_to(folders))
    return target


def test_folders_zips_and_official_names_give_the_same_images(folders, tmp_path):
    images = load_omniglot(folders)
    assert images.shape == (40, 20, 28, 28) and images.dtype == np.uint8
    assert images[:, :, :, :].max() == 255 and (images == 0).mean() > 0.9  # ink is 255 on paper 0
    for names in ("omniglot_{}.zip", "{}.zip"):
        folder = tmp_path / names.format("x")
        folder.mkdir()
        assert np.array_equal(load_omniglot(zipped(folders, folder, names)), images)


def test_the_npz_is_the_archives(data_folder, tmp_path):
    """The real data: the first characters of the real archive, decoded here, against the npz at hand."""
    with np.load(data_folder / "omniglot.npz", allow_pickle=False) as archive:
        reference, labels = archive["images"], archive["labels"]
    with zipfile.ZipFile(data_folder / "omniglot_images_background.zip") as source:
        names = [n for n in source.namelist() if "/Bengali/" in n and n.endswith(".png")]
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(source.read(name))
    images = load_omniglot(tmp_path)
    rows = [i for i, label in enumerate(labels) if str(label).startswith("Bengali/")]
    assert len(images) == len(rows) == 46
    assert np.abs(images.astype(int) - reference[rows].astype(int)).max() <= 2


def test_real_episodes(data_folder):
    family = Omniglot(root=str(data_folder), n_way=20, k_shot=1, queries=5)
    (xs, ys), (xq, yq) = family.sample(3, episode_generator(0, "train", 0))
    assert xs.shape == (3, 20, 1, 28, 28) and xq.shape == (3, 100, 1, 28, 28)
    assert xs.min() >= 0 and xs.max() <= 1 and 0.02 < xs.mean() < 0.3
    assert {len(c) for c in family._classes.values()} == {1100, 100, 423}
    assert len(set().union(*(c.tolist() for c in family._classes.values()))) == 1623


def test_splits_share_no_character(folders):
    family = Omniglot(root=str(folders), n_way=2, queries=2)
    family.setup()
    classes = [set(c.tolist()) for c in family._classes.values()]
    assert sum(map(len, classes)) == 40 and len(set.union(*classes)) == 40
    again = Omniglot(root=str(folders), n_way=2, queries=2)
    again.setup()
    assert all(torch.equal(a, b) for a, b in zip(family._classes.values(), again._classes.values(), strict=True))


def test_a_missing_data_set_says_where_to_put_what(tmp_path):
    with pytest.raises(
        DatasetError,
        match=r"Omniglot was not found in .*Omniglot\(download=True\) downloads it.*Or put there omniglot_images_background.zip.*LMG_DATA=/path",
    ):
        Omniglot(root=str(tmp_path)).setup()


def test_damage_is_named(folders, tmp_path):
    cases = tmp_path / "a", tmp_path / "b", tmp_path / "c", tmp_path / "d", tmp_path / "e"
    for case in cases:
        case.mkdir()
    (cases[0] / "omniglot.npz").write_bytes(b"no archive")
    with pytest.raises(DatasetError, match="omniglot.npz is damaged"):
        load_omniglot(cases[0])
    np.savez(cases[1] / "omniglot.npz", images=np.zeros((3, 20, 14, 14), np.uint8))
    with pytest.raises(DatasetError, match=r"shape \(3, 20, 14, 14\) where uint8"):
        load_omniglot(cases[1])
    (cases[2] / "omniglot_images_background.zip").write_bytes(b"no zip")
    with pytest.raises(DatasetError, match="omniglot_images_background.zip is damaged"):
        load_omniglot(cases[2])
    shutil.copytree(folders / "images_evaluation", cases[3] / "images_evaluation")
    victim = sorted((cases[3] / "images_evaluation").rglob("*.png"))[0]
    victim.write_bytes(b"no image")
    with pytest.raises(DatasetError, match=f"{victim.name} of .*images_evaluation is damaged"):
        load_omniglot(cases[3])
    victim.unlink()
    with pytest.raises(DatasetError, match="is incomplete: .* holds 19 images instead of 20"):
        load_omniglot(cases[3])


def test_other_damage_is_named_too(folders, tmp_path):
    for name, content in (("empty", b""), ("npy", None)):
        (tmp_path / name).mkdir()
        path = tmp_path / name / "omniglot.npz"
        if content is not None:
            path.write_bytes(content)
        else:
            with path.open("wb") as stream:
                np.save(stream, np.zeros(3))
        with pytest.raises(DatasetError, match=r"omniglot\.npz is damaged"):
            load_omniglot(tmp_path / name)
    zipped(folders, tmp_path)
    archive = tmp_path / "omniglot_images_background.zip"
    data = bytearray(archive.read_bytes())
    data[60:160] = bytes(100)
    archive.write_bytes(bytes(data))
    with pytest.raises(DatasetError, match="damaged"):
        load_omniglot(tmp_path)


def test_what_a_mac_adds_to_an_archive_is_passed_over(folders, tmp_path):
    zipped(folders, tmp_path)
    with zipfile.ZipFile(tmp_path / "omniglot_images_background.zip", "a") as archive:
        archive.writestr("__MACOSX/images_background/Alphabet_0/character00/._0000_00.png", b"resource fork")
    assert len(load_omniglot(tmp_path)) == 40


def test_an_npz_with_code_in_it_is_not_run(tmp_path):
    buffer = io.BytesIO()
    np.savez(buffer, images=np.array([object()], dtype=object))
    (tmp_path / "omniglot.npz").write_bytes(buffer.getvalue())
    with pytest.raises(DatasetError, match="damaged"):
        load_omniglot(tmp_path)


def test_the_folder_comes_from_the_argument_then_the_environment(monkeypatch):
    monkeypatch.setenv("LMG_DATA", "/somewhere")
    assert str(data_root("/else")) == "/else" and str(data_root(None)) == "/somewhere"
    monkeypatch.delenv("LMG_DATA")
    assert str(data_root(None)) == "data"


def test_an_episode_larger_than_the_split_is_refused(folders):
    with pytest.raises(ValueError, match="n_way=5 classes but this split has 3"):
        Omniglot(root=str(folders), n_way=5).setup()
    with pytest.raises(ValueError, match="different images per class but there are 20"):
        Omniglot(k_shot=15, queries=15)
