"""What is wrong with a command line is told in one line that names the option; what is wrong elsewhere is raised."""

from argparse import ArgumentError
from dataclasses import dataclass

import pytest
import yaml

from lightning_maml_guard.cli.arguments import translate
from lightning_maml_guard.cli.errors import with_nearest, wrong_argument, wrong_option
from lightning_maml_guard.cli.main import _built, main
from lightning_maml_guard.utils.checks import check_number
from lightning_maml_guard.utils.lightning_compat import LightningModule

pytestmark = pytest.mark.usefixtures("elsewhere")


class Broken(LightningModule):
    """A module that fails by itself, and not for what it was given."""

    def __init__(self):
        super().__init__()
        raise ValueError("broken")


@dataclass(frozen=True)
class Options:
    tol: float = 0.1
    steps: int = 5

    def __post_init__(self):
        check_number("tol", self.tol, above=0, below=1)


class WithOptions(LightningModule):
    def __init__(self, options: Options = Options()):
        super().__init__()


@pytest.fixture(scope="module")
def run():
    """The command line up to its Trainer, its parser made once."""
    cli = _built("", ["linear"])

    def run(words):
        cli.parse_arguments(cli.parser, translate(words))
        cli.instantiate_classes()

    return run


def refused(capsys, run, *words):
    with pytest.raises(SystemExit) as stopped:
        run(list(words))
    assert stopped.value.code == 2
    line = capsys.readouterr().err.rstrip().splitlines()[-1]
    assert "error: " in line
    return line.partition("error: ")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "--guard.curvature.criterion exakt",
            "--guard.curvature.criterion: * one of ('simplified', 'exact') but got 'exakt'. Did you",
        ),
        ("--guard.action=mad", "--guard.action: * one of ('log', 'warn', 'rescale', 'stop') but got 'mad'."),
        ("--guard.margin=0", "--guard.margin: * a number above 0 and at most 1 but got 0.0."),
        (
            "--guard.curvature.estimator=arnoldi",
            "--guard.curvature.estimator: * 'lanczos', 'pyhessian' or a callable * but got 'arnoldi'.",
        ),
        ("--guard.curvature.tasks=bad", "--guard.curvature.tasks: * one of ('mean', 'worst') but got 'bad'."),
        ("--guard.curvature.data=bad", "--guard.curvature.data: * one of ('support', 'query', 'both') but got 'bad'."),
        (
            "--guard.lookahead.divergence_ratio=1",
            "--guard.lookahead.divergence_ratio: * a finite number above 1 but got 1.0.",
        ),
        ("--guard.snapshot_device=mars", "--guard.snapshot_device: * a device such as 'cpu' * but got 'mars'."),
        ("--guard.rollback=true", "--guard: rollback=True * needs action='rescale' * but got 'warn' and 10."),
        (
            "--guard=rescale --guard.rollback=true --guard.lookahead.steps=0",
            "--guard: rollback=True * 'rescale' and 0.",
        ),
        ("--guard.margin=x", "--guard.margin: Expected float. Got value: x"),
        ("--guard.every_n_steps=often", "--guard.every_n_steps: Expected int. Got value: often"),
        ("--guard.problem=3", "--guard.problem: Expected a dot import path string: 3"),
        ("--model.inner_lr=-1", "--model.inner_lr: * of at least 0 but got -1.0."),
        ("--model.network.hidden=[0]", "--model.network.hidden: *`hidden[0]` to be an integer of at least 1 but got 0"),
        ("--data.tasks.shots=0", "--data.tasks.shots: * an integer of at least 1 but got 0."),
        ("--guard.every_n_step=5", "unrecognized option --guard.every_n_step. Did you mean --guard.every_n_steps?"),
        ("--model.inner_lrr=5", "unrecognized option --model.inner_lrr. Did you mean --model.inner_lr?"),
        ("--model.optimizer.lrr=5", "unrecognized option --model.optimizer.lrr. Did you mean --model.optimizer.lr?"),
        ("--data.tasks.shotz=5", "unrecognized option --data.tasks.shotz. Did you mean --data.tasks.shots?"),
        ("--trainer.max_stepps=5", "unrecognized arguments: --trainer.max_stepps=5. Did you mean --trainer.max_steps?"),
        ("--guard.margin=1.5", "--guard.margin: * a number above 0 and at most 1 but got 1.5."),
        ("--model.optimizer.lr=1e400", "--model.optimizer.lr: * a finite number of at least 0 but got inf."),
        ("--model.optimizer.lr=-1", "--model.optimizer.lr: * a finite number of at least 0 but got -1.0."),
        ("--model.optimizer=torch.optim.Sgd", "--model.optimizer: * Did you mean 'torch.optim.SGD'?$"),
        ("--model.optimizer=SGDD", "--model.optimizer: * Did you mean 'SGD'?$"),
        ("--model=MetaLearningModul", "--model: * Did you mean 'MetaLearningModule'?$"),
        (
            "--model.network=lightning_maml_guard.networks.mpl",
            "--model.network: * Did you mean 'lightning_maml_guard.networks.mlp'?$",
        ),
        ("--data.tasks=Sinusoidd", "--data.tasks: * Did you mean 'Sinusoid'?$"),
        ("--data TaskDatModule", "--data: * Did you mean 'TaskDataModule'?$"),
        ("--trainer.callbacks=ModelChekpoint", "--trainer.callbacks: * Did you mean 'ModelCheckpoint'?$"),
        ("--trainer.accelerator=gpuu", "--trainer: You selected an invalid accelerator name"),
        ("--trainer.limit_train_batches=1.5", "--trainer: You have passed invalid value 1.5 for limit_train_batches"),
        ("--modle.inner_lr=5", "unrecognized arguments: --modle.inner_lr=5. Did you mean --model.inner_lr?"),
        ("--gaurd", "unrecognized arguments: --gaurd. Did you mean --guard?"),
        ("--optimizer=SGD", "unrecognized arguments: --optimizer=SGD. Did you mean --model.optimizer?"),
        ("--optimizer SGDD", "unrecognized arguments: --optimizer SGDD. Did you mean --model.optimizer?"),
        ("--max_stepz=5", "unrecognized arguments: --max_stepz=5. Did you mean --trainer.max_steps?"),
        ("--lr=1", "unrecognized arguments: --lr=1. Did you mean --model.optimizer.lr?"),
        ("--guard.zzz=1", "unrecognized option --guard.zzz.$"),
    ],
)
def test_a_wrong_option_is_one_line(words, said, capsys, run):
    line = refused(capsys, run, "linear", *words.split())
    *begins, end = said.removesuffix("$").split("*")
    place = 0
    for number, part in enumerate([*begins, end]):
        found = line.find(part, place)
        assert found == 0 if number == 0 else found > 0, f"{part!r} in\n{line}"
        place = found + len(part)
    assert not said.endswith("$") or place == len(line)


def test_a_wrong_yaml_is_one_line(capsys, elsewhere, run):
    guard = {"class_path": "lightning_maml_guard.ConvergenceGuard"}
    for content, said in (
        (
            {"guard": guard | {"init_args": {"curvature": {"criterion": "exakt"}}}},
            "--guard.curvature.criterion: Expected argument `criterion`",
        ),
        ({"guard": guard | {"init_args": {"marginn": 1}}}, "unrecognized option --guard.marginn. Did you mean --guard"),
        ({"trainer": {"max_stepz": 1}}, "unrecognized option --trainer.max_stepz. Did you mean --trainer.max_steps?"),
    ):
        (elsewhere / "own.yaml").write_text(yaml.safe_dump(content))
        assert refused(capsys, run, "linear", "--config", "own.yaml").startswith(said)
    assert refused(capsys, run, "--config=none.yaml").startswith("--config: File does not exist: ")


def test_options_of_one_of_several_types_and_of_dataclasses_are_one_line_too(capsys, run):
    callback = "--trainer.callbacks=ModelCheckpoint --trainer.callbacks"
    model = f"--model={__name__}.WithOptions --model"
    for words, said in (
        (f"{callback}.save_top_k=many", "--trainer.callbacks.save_top_k: Expected int. Got value: many"),
        (f"{callback}.dirpat=x", "unrecognized option --trainer.callbacks.dirpat. Did you mean --trainer.callbacks.dirpath?"),
        ("--seed_everything=x", "--seed_everything: Expected bool or int. Got value: x"),
        (f"{model}.options.tol=7", "--model.options.tol: Expected argument `tol` to be a number between 0 and 1 but got 7.0."),
        (f"{model}.options.toll=1", "unrecognized option --model.options.toll. Did you mean --model.options.tol?"),
        (f"{model}.options.tol=x", "--model.options.tol: Expected float. Got value: x"),
    ):  # fmt: skip
        assert refused(capsys, run, "linear", *words.split()).startswith(said)


def test_the_commands_have_options_of_their_own(capsys):
    for words, said in (
        ("suggest linear --margin=much", "argument --margin: invalid float value: 'much'"),
        ("suggest linear --margin=2", "argument --margin: Expected argument `margin` to be a number between 0 and 1"),
        (
            "suggest linear --batches=0",
            "argument --batches: Expected argument `batches` to be an integer of at least 1",
        ),
        (
            "suggest linear --guard.curvature.tol=7",
            "--guard.curvature.tol: Expected argument `tol` to be a number between 0 and 1",
        ),
        ("suggest linear --steps=0", "argument --steps: Expected argument `steps` to be an integer of at least 1"),
        ("suggest linear --apply=none/out.yaml", "--apply: the folder none does not exist. Make it first."),
        ("suggest linear --marginn=1", "unrecognized arguments: --marginn=1. Did you mean --margin?"),
        ("phase-diagram --gird 5", "unrecognized arguments: --gird. Did you mean --grid?"),
        ("phase-diagram sinusoid --gird=5", "unrecognized arguments: --gird=5. Did you mean --grid?"),
        (
            "phase-diagram omniglott",
            "expected the panel to be one of linear, sinusoid, omniglot, miniimagenet, near-minimum but got 'omniglott'. Did you mean 'omniglot'?",
        ),
        ("phase-diagram omniglot --data /nowhere", "--data: Omniglot was not found in /nowhere."),
        ("fit omniglot --data /nowhere", "--data: Omniglot was not found in /nowhere."),
        ("fit omniglot --data nowhere", "--data: Omniglot was not found in "),
        ("fit omniglot --data=.", "--data: Omniglot was not found in "),
        ("suggest miniimagenet --data .", "--data: miniImageNet was not found in "),
        ("linaer", "expected the task to be one of"),
        (
            "--guard reskale",
            "expected --guard to be one of log, warn, rescale, stop but got 'reskale'. Did you mean 'rescale'?",
        ),
        (
            "fit linear --ckpt_path best",
            "--ckpt_path: only the process that trains knows which checkpoint is the 'best'.",
        ),
        (
            "validate linear --ckpt_path last",
            "--ckpt_path: there is no checkpoint in runs/linear. Train first, or name the file.",
        ),
        ("fit linear --ckpt_path none.ckpt", "--ckpt_path: there is no checkpoint none.ckpt."),
        ("phase-diagram --zzz", "unrecognized arguments: --zzz"),
        ("fit linear --marginn=1", "unrecognized arguments: --marginn=1. Did you mean --guard.margin?"),
        ("test linear --gaurd", "unrecognized arguments: --gaurd"),
        ("validate linear --data.val_episodes=0", "--data.val_episodes: validate judges on the validation episodes"),
    ):
        line = refused(capsys, main, *words.split())
        assert line.startswith(said) and ("Did you mean" in said or "Did you mean" not in line or words == "linaer")


def test_a_missing_jsonargparse_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    line = refused(capsys, main, "linear")
    assert line.startswith("the command line needs packages that training does not, jsonargparse among them.")
    assert "pip install 'lightning-maml-guard[examples]'" in line


def interrupt(*_, **__):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("place", "words", "said"),
    [
        ("cli.main._built", "linear", "Interrupted.\n"),
        (
            "cli.phase_diagram.phase_diagram",
            "phase-diagram",
            "Interrupted. The same command goes on from what is trained.\n",
        ),
        ("cli.paper_near_minimum.minimum", "phase-diagram near-minimum", "Interrupted.\n"),
    ],
)
def test_ctrl_c_ends_in_a_line(place, words, said, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"lightning_maml_guard.{place}", interrupt)
    with pytest.raises(SystemExit) as raised:
        main(words.split())
    assert raised.value.code == 130 and capsys.readouterr().err == f"\n{said}"


def test_what_fails_by_itself_keeps_its_traceback(run):
    with pytest.raises(ValueError, match="broken") as raised:
        run(["linear", f"--model={__name__}.Broken"])
    assert wrong_argument(raised.value, {}) is None


def test_an_error_of_another_kind_is_left_as_it_is():
    # The keys of two alternatives, side by side: neither is the path to what is wrong.
    several = 'Parser key "a":\n  Errors:\n    - Parser key "b":\n        no\n    - Parser key "c":\n        never'
    for message in ("one of the arguments is required", several):
        assert with_nearest(message, ["a"]) == message and wrong_option(ArgumentError(None, message), []) is None
