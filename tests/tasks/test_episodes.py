import pytest
import torch

from lightning_maml_guard.tasks.episodes import check_episode, episode_generator, sample_n_way_k_shot
from lightning_maml_guard.tasks.regression import LinearRegression, Sinusoid


def marked_images(classes=6, each=8):
    """Every image holds its own number, so that an episode tells which images it took."""
    return (
        (torch.arange(classes * each).float().reshape(classes, each, 1, 1, 1) / 1000)
        .expand(-1, -1, 1, 4, 4)
        .contiguous()
    )


def test_episodes_hold_n_classes_k_shots_and_no_image_twice():
    images = marked_images()
    support, query = sample_n_way_k_shot(
        images, torch.arange(6), 50, torch.Generator().manual_seed(0), n_way=3, k_shot=2, queries=4
    )
    assert support[0].shape == (50, 6, 1, 4, 4) and query[0].shape == (50, 12, 1, 4, 4)
    assert support[1][0].tolist() == [0, 0, 1, 1, 2, 2] and query[1][7].tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for task in range(50):
        number = (torch.cat([support[0][task], query[0][task]])[:, 0, 0, 0] * 1000).round().long()
        label = torch.cat([support[1][task], query[1][task]])
        assert len(set(number.tolist())) == 18
        classes = [set((number[label == k] // 8).tolist()) for k in range(3)]
        assert all(len(c) == 1 for c in classes) and len(set.union(*classes)) == 3


def test_only_the_given_classes_are_drawn_and_all_of_them():
    images = marked_images()
    support, _ = sample_n_way_k_shot(
        images, torch.tensor([1, 4, 5]), 100, torch.Generator().manual_seed(0), n_way=2, k_shot=1, queries=1
    )
    drawn = set(((support[0][..., 0, 0, 0] * 1000).round().long() // 8).flatten().tolist())
    assert drawn == {1, 4, 5}


def test_rotations_are_classes_of_their_own():
    image = torch.zeros(1, 4, 1, 3, 3, dtype=torch.uint8)
    image[..., 0, 0] = 255  # one corner tells the turn
    (x, _), (q, _) = sample_n_way_k_shot(
        image,
        torch.tensor([0]),
        20,
        torch.Generator().manual_seed(0),
        n_way=4,
        k_shot=1,
        queries=2,
        rotations=True,
    )
    corners = torch.stack([x[..., 0, 0, 0], x[..., 0, 0, 2], x[..., 0, 2, 0], x[..., 0, 2, 2]], -1)
    assert x.max() == 1.0 and torch.equal(corners.sum(-1), torch.ones(20, 4))
    assert all(len(set(task.argmax(-1).tolist())) == 4 for task in corners)
    assert torch.equal(q[:, ::2], q[:, 1::2]) and torch.equal(q[:, ::2], x)  # support and query turn alike


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((6, 1, 1, 5, 20), "n_way=6 classes but this split has 5"),
        ((5, 10, 11, 5, 20), "k_shot=10 . queries=11 different images per class but there are 20"),
        ((0, 1, 1, 5, 20), "`n_way` to be an integer of at least 1 but got 0"),
    ],
)
def test_an_episode_the_data_cannot_serve_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        check_episode(*arguments)


def test_generators_depend_on_seed_split_and_index_alone():
    draws = {
        tuple(torch.rand(4, generator=episode_generator(s, split, i)).tolist())
        for s in (0, 1)
        for split in ("train", "val", "test")
        for i in range(5)
    }
    assert len(draws) == 30
    assert torch.equal(
        torch.rand(4, generator=episode_generator(3, "val", 2)),
        torch.rand(4, generator=episode_generator(3, "val", 2)),
    )


def test_sinusoids_are_finn_et_als():
    (xs, ys), (xq, yq) = Sinusoid(shots=10, queries=30).sample(2000, torch.Generator().manual_seed(0))
    assert xs.shape == (2000, 10, 1) and xq.shape == (2000, 30, 1)
    assert xs.min() >= -5 and xs.max() <= 5 and xs.min() < -4.99 and xs.max() > 4.99
    # Every task is a*sin(x - p): two parameters explain all forty points.
    x, y = torch.cat([xs, xq], 1).double(), torch.cat([ys, yq], 1).double()
    basis = torch.cat([torch.sin(x), torch.cos(x)], -1)
    coefficients = torch.linalg.lstsq(basis, y).solution
    assert float((basis @ coefficients - y).abs().max()) < 1e-5
    amplitude = coefficients.norm(dim=1).flatten()
    phase = torch.atan2(-coefficients[:, 1], coefficients[:, 0]).flatten()
    assert 0.1 <= amplitude.min() < 0.12 and 4.98 < amplitude.max() <= 5.0001
    assert phase.min() >= -1e-4 and phase.max() <= 3.1416


def test_linear_tasks_are_linear_up_to_the_noise():
    family = LinearRegression(features=3, shots=50, noise=0.0, dtype="float64")
    (x, y), (xq, yq) = family.sample(4, torch.Generator().manual_seed(0))
    weight = torch.linalg.lstsq(x, y).solution
    torch.testing.assert_close(xq @ weight, yq)
    same = LinearRegression(same_query=True).sample(2, torch.Generator())
    assert same.support is same.query and same.support[0].dtype == torch.float32
    spread = (
        LinearRegression(features=2, shots=5000, condition=10.0)
        .sample(1, torch.Generator().manual_seed(0))
        .support[0][0]
        .std(0)
    )
    assert float(spread[0] / spread[1]) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sinusoid(shots=0), "`shots` to be an integer of at least 1 but got 0"),
        (lambda: LinearRegression(features=1.5), "`features` to be an integer of at least 1 but got 1.5"),
        (lambda: LinearRegression(noise=-1), "`noise` to be a finite number of at least 0 but got -1"),
        (lambda: LinearRegression(condition=0.5), "`condition` to be a finite number of at least 1 but got 0.5"),
        (lambda: LinearRegression(dtype="int8"), r"`dtype` to be one of \('float32', 'float64'\) but got 'int8'"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
