"""A long guarded run: nothing grows, nothing is left behind."""

import gc
from pathlib import Path
from statistics import mean

import pytest
import torch
from torch.optim import SGD

from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
from lightning_maml_guard.utils.lightning_compat import Callback, Trainer
from tests.helpers import QUIET

PAGE = 4096


class Watch(Callback):
    """Resident memory and living tensors, along the run."""

    def __init__(self, every):
        self.every, self.resident, self.tensors, self.graphs = every, [], [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step % self.every == self.every - 1:
            gc.collect()
            living = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]
            self.tensors.append(len(living))
            self.graphs.append(sum(each.grad_fn is not None for each in living))
            self.resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * PAGE / 2**20)


@pytest.mark.slow
@pytest.mark.parametrize("steps", [300, 20_000])
@pytest.mark.filterwarnings("ignore::lightning_maml_guard.GuardWarning")
def test_memory_stays_flat_and_nothing_is_left(steps):
    torch.manual_seed(0)
    module = MetaLearningModule(mlp(hidden=(16,)), inner_lr=0.02, optimizer=lambda p: SGD(p, lr=0.3, momentum=0.5))
    watch = Watch(every=steps // 20)
    guard = ConvergenceGuard(every_n_steps=10, action="rescale", rollback=True, history_size=20)
    trainer = Trainer(
        max_steps=steps,
        **QUIET,
        callbacks=[guard, watch],
    )
    data = TaskDataModule(Sinusoid(shots=5), meta_batch_size=4, steps_per_epoch=steps, val_episodes=0)
    trainer.fit(module, data)
    assert trainer.global_step == steps
    second, last = watch.resident[5:10], watch.resident[15:]
    print(f"{steps} steps: {mean(second):.1f} MiB in the second quarter, {mean(last):.1f} in the last")
    print(f"tensors {watch.tensors[5]} to {watch.tensors[-1]}, with a graph {max(watch.graphs)}")
    assert mean(last) < 1.01 * mean(second)
    assert watch.tensors[-1] <= max(watch.tensors[5:10]) and max(watch.graphs) <= max(watch.graphs[:5])
    assert len(guard.history) == 20 and len(guard.severities) == 20
    (optimizer,) = trainer.optimizers
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not {"log", "log_dict"} & set(module.__dict__) and not module._forward_pre_hooks
    assert guard._run.ring.latest is None and not guard._run.replay.earlier()
