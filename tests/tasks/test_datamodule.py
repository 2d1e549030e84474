import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint

from lightning_maml_guard import TaskDataModule
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import LightningModule, Trainer


def batches(loader):
    return [batch.support[0] for batch in loader]


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_episodes_are_identical_with_any_number_of_workers():
    alone = TaskDataModule(Sinusoid(), steps_per_epoch=6, val_episodes=9)
    helped = TaskDataModule(Sinusoid(), steps_per_epoch=6, val_episodes=9, num_workers=2)
    assert same(batches(alone.train_dataloader()), batches(helped.train_dataloader()))
    assert same(batches(alone.val_dataloader()), batches(helped.val_dataloader()))


def test_epochs_bring_new_tasks_and_a_resumed_epoch_the_same():
    loader = TaskDataModule(Sinusoid(), steps_per_epoch=3).train_dataloader()
    first = batches(loader)
    loader.sampler.set_epoch(1)
    second = batches(loader)
    assert not any(torch.equal(a, b) for a in first for b in second)
    loader.sampler.set_epoch(0)
    assert same(batches(loader), first)


def test_lightning_tells_the_sampler_its_epoch():
    seen = []

    class Watcher(LightningModule):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def training_step(self, batch, batch_idx):
            seen.append(batch.support[0].clone())
            return self.weight.sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Watcher(), TaskDataModule(Sinusoid(), steps_per_epoch=2, val_episodes=0))
    assert len({tuple(x.flatten().tolist()) for x in seen}) == 4


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_where_it_was_interrupted(workers):
    whole = batches(TaskDataModule(Sinusoid(), steps_per_epoch=5).train_dataloader())
    loader = TaskDataModule(Sinusoid(), steps_per_epoch=5, num_workers=workers).train_dataloader()
    begun = iter(loader)
    for _ in range(2):
        next(begun)
    state = loader.state_dict()
    again = TaskDataModule(Sinusoid(), steps_per_epoch=5, num_workers=workers).train_dataloader()
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert same(batches(again), whole[2:])
    assert same(batches(again), whole)  # the next epoch is a whole one


def test_an_epoch_that_ended_is_followed_by_a_whole_one():
    loader = TaskDataModule(Sinusoid(), steps_per_epoch=3).train_dataloader()
    whole = batches(loader)
    loader.load_state_dict(loader.state_dict())
    assert same(batches(loader), whole)


@pytest.mark.parametrize("resample", [True, False])
def test_each_process_draws_tasks_of_its_own(monkeypatch, resample):
    indices = []
    for rank in range(3):
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 3)
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        sampler = TaskDataModule(Sinusoid(), steps_per_epoch=4, resample=resample).train_dataloader().sampler
        for epoch in range(2):
            sampler.set_epoch(epoch)
            indices.append(list(sampler))
    assert all(len(each) == 4 for each in indices)
    assert len({index for each in indices for index in each}) == (24 if resample else 3)


def test_without_resampling_every_step_sees_the_same_tasks():
    found = batches(TaskDataModule(Sinusoid(), steps_per_epoch=4, resample=False).train_dataloader())
    assert all(torch.equal(x, found[0]) for x in found)


def test_the_number_of_evaluation_episodes_is_kept():
    data = TaskDataModule(Sinusoid(), meta_batch_size=4, val_episodes=10, test_episodes=7)
    assert [len(x) for x in batches(data.val_dataloader())] == [4, 4, 2]
    assert [len(x) for x in batches(data.test_dataloader())] == [4, 3]
    assert TaskDataModule(Sinusoid(), val_episodes=0).val_dataloader() == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"tasks": "sinusoid"}, TypeError, "`tasks` to be a TaskFamily .* but got str"),
        ({"meta_batch_size": 0}, ValueError, "`meta_batch_size` to be an integer of at least 1 but got 0"),
        (
            {"steps_per_epoch": 1.5},
            ValueError,
            "`steps_per_epoch` to be an integer of at least 1 but got 1.5",
        ),
        ({"val_episodes": -1}, ValueError, "`val_episodes` to be an integer of at least 0 but got -1"),
        ({"test_episodes": 0}, ValueError, "`test_episodes` to be an integer of at least 1 but got 0"),
        ({"num_workers": -1}, ValueError, "`num_workers` to be an integer of at least 0 but got -1"),
        ({"seed": -1}, ValueError, "`seed` to be an integer of at least 0 but got -1"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        TaskDataModule(**{"tasks": Sinusoid(), **arguments})


class Sees(LightningModule):
    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(1)), []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.support[0].sum().item())
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def seen(folder, checkpoint=None, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    module, keep = Sees(), ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = Trainer(**{**quiet, "max_epochs": -1, "max_steps": 18, "callbacks": [keep], **options})
    trainer.fit(module, TaskDataModule(Sinusoid(), steps_per_epoch=10, val_episodes=0), ckpt_path=checkpoint)
    return module.seen


@pytest.mark.parametrize("limit", [6, 10])
def test_a_resumed_run_sees_the_tasks_it_would_have_seen(tmp_path, limit):
    whole = seen(tmp_path, limit_train_batches=limit)
    assert len(set(whole)) == 18
    for step in (3, 6, 9, 12):
        assert seen(tmp_path / "again", tmp_path / f"step={step}.ckpt", limit_train_batches=limit) == whole[step:], step


def test_a_sampler_that_lightning_puts_in_place_is_served(tmp_path):
    assert len(set(seen(tmp_path, overfit_batches=2, max_steps=6))) == 2
