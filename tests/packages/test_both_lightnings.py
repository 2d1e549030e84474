"""The guard in Trainers and command lines of pytorch_lightning and of lightning, each in a process of its own."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(find_spec("lightning") is None, reason="lightning is not installed beside it")
TRAIN = """
import torch, warnings
from torch.utils.data import DataLoader
from torch.optim import SGD
from lightning_maml_guard.networks import mlp
from lightning_maml_guard.tasks.regression import Sinusoid
quiet = dict(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
             enable_model_summary=False, max_steps=6)
def train(pl, module, data, **options):
    guard = ConvergenceGuard(every_n_steps=2, action="rescale")
    trainer = pl.Trainer(callbacks=[guard], **quiet)
    trainer.fit(module, data)
    assert [report.step for report in guard.history] == [0, 2, 4] and guard.history[-1].beta_applied < 30
    assert type(trainer).__module__.startswith(pl.__name__) and isinstance(guard, pl.Callback)
def optimizer(parameters):
    return SGD(parameters, lr=30.0)
def episodes():
    return TaskDataModule(Sinusoid(), steps_per_epoch=6, val_episodes=0)
"""
ALONE = """
{first}
from lightning_maml_guard import ConvergenceGuard, MetaLearningModule, TaskDataModule
{train}
{then}
train(pl, MetaLearningModule(mlp(), optimizer=optimizer), episodes())
"""
MIXIN = """
import lightning as L, lightning.pytorch, pytorch_lightning
from lightning_maml_guard import ConvergenceGuard, MetaLearning, TaskDataModule
{train}
for pl in (lightning.pytorch, pytorch_lightning):
    class Mine(MetaLearning, pl.LightningModule):
        pass
    module = Mine(mlp(), optimizer=optimizer, inner_lr=0.02)
    assert module.hparams.inner_lr == 0.02
    train(pl, module, episodes())
"""
FOREIGN = """
import lightning.pytorch as pl
from lightning_maml_guard import ConvergenceGuard
{train}
class Plain(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
    def training_step(self, batch):
        return (self.layer(batch) ** 2).mean()
    def configure_optimizers(self):
        return SGD(self.parameters(), lr=30.0)
train(pl, Plain(), DataLoader(torch.ones(12, 2), batch_size=2))
"""
COMMAND = """
import lightning.pytorch
from lightning_maml_guard.cli.main import main
cli = main(["linear", "--guard", "log", "--trainer.max_steps", "3", "--data.val_episodes", "0", "--data.test_episodes", "4",
            "--trainer.enable_progress_bar", "false"])
assert type(cli.trainer).__module__.startswith("lightning.pytorch") and len(cli.guard.history) == 1
assert type(cli.trainer.logger).__module__.startswith("lightning.pytorch")
"""
BLOCK = "import sys; sys.modules['pytorch_lightning'] = None"


def run(code: str, folder: Path, *, train: bool = True, **parts: str) -> subprocess.CompletedProcess:
    code = code.format(train=TRAIN, **parts) if train else code
    header = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    return subprocess.run(
        [sys.executable, "-c", header + code], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.parametrize(
    ("first", "then"),
    [
        ("", "import pytorch_lightning as pl"),
        pytest.param("import pytorch_lightning as pl", "", marks=pytest.mark.slow),
        pytest.param("import lightning as L; import lightning.pytorch as pl", "", marks=pytest.mark.slow),
        (BLOCK, "import lightning.pytorch as pl"),  # lightning alone is installed
    ],
    ids=["guard-first", "pytorch_lightning", "lightning", "lightning-alone"],
)
def test_callback_module_and_data_module_work_in_the_package_that_is_used(tmp_path, first, then):
    done = run(ALONE, tmp_path, first=first, then=then)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "does not mix" not in done.stderr and "do not mix" not in done.stderr


@pytest.mark.parametrize("code", [MIXIN, FOREIGN], ids=["mixin", "foreign"])
def test_modules_of_either_package_are_guarded(tmp_path, code):
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_command_line_is_that_of_the_package_that_is_used(tmp_path):
    done = run(COMMAND, tmp_path, train=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_data_module_beside_the_other_package_gives_our_message(tmp_path):
    code = (
        "from lightning_maml_guard import TaskDataModule\nfrom lightning_maml_guard.tasks.regression import Sinusoid\n"
        "import lightning.pytorch\nTaskDataModule(Sinusoid())"
    )
    done = run(code, tmp_path, train=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (
        "TaskDataModule is a data module of pytorch_lightning, and lightning.pytorch is imported as well, whose Trainer "
        "does not accept it: the two packages do not mix. If your Trainer is pytorch_lightning's, do nothing. If it is "
        "lightning.pytorch's, import lightning alone and before lightning_maml_guard."
    ) in done.stderr.replace("\n", " ")


def test_mixing_gives_our_message(tmp_path):
    done = run(ALONE, tmp_path, first="", then="import lightning.pytorch as pl")
    assert done.returncode != 0
    said = done.stderr.replace("\n", " ")
    assert "MetaLearningModule is a module of pytorch_lightning, and lightning.pytorch is imported as well" in said
    assert "import lightning alone and before lightning_maml_guard, or write class Mine(" in said


def test_without_either_package_the_message_says_what_to_install(tmp_path):
    blocked = "for name in ('pytorch_lightning', 'lightning'): sys.modules[name] = None\n"
    code = blocked + "from lightning_maml_guard import critical_rates\nassert critical_rates([1.0], 0.1).alpha_c == 1\n"
    done = run(code + "from lightning_maml_guard import ConvergenceGuard", tmp_path, train=False)
    assert done.returncode != 0 and "pip install pytorch-lightning" in done.stderr.replace("\n", " ")


def test_the_mixin_alone_is_refused():
    from lightning_maml_guard import MetaLearning
    from lightning_maml_guard.networks import mlp

    with pytest.raises(TypeError, match=r"Expected MetaLearning to be a LightningModule as well.*Write class"):
        MetaLearning(mlp())
