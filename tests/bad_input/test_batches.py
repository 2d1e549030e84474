"""Batches that do not fit the network, the loss or each other: refused at the first batch, with and without a guard."""

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_maml_guard import (
    ConvergenceGuard,
    EpisodeBatch,
    LookaheadOptions,
    MetaLearningModule,
    MetaProblem,
    measure,
    suggest_rates,
)
from lightning_maml_guard.maml.batch_errors import BatchError
from lightning_maml_guard.maml.meta_gradient import meta_gradient
from lightning_maml_guard.networks import conv4, mlp
from tests.bad_input.test_arguments import problem
from tests.helpers import fit, guard_warns

X, Y = torch.ones(2, 5, 1), torch.zeros(2, 5, 1)
LABELS = torch.arange(5).expand(2, 5)
BYTES = torch.zeros(2, 5, 1, 28, 28, dtype=torch.uint8)
NAN = torch.full((2, 5, 1), math.nan)
GOOD = (X, Y)


def episodes(support=GOOD, query=GOOD):
    return EpisodeBatch(support, query)


def both(x, y):
    return EpisodeBatch((x, y), (x, y))


def regressor():
    return MetaLearningModule(mlp(hidden=(3,)))


def classifier():
    return MetaLearningModule(mlp(hidden=(3,), out_features=5))


def small_conv():
    return MetaLearningModule(conv4(filters=2))


def recurrent():
    return MetaLearningModule(nn.LSTM(1, 1))


def embedding():
    return MetaLearningModule(nn.Sequential(nn.Embedding(3, 1), nn.Flatten(1)))


def with_loss(loss):
    return lambda: MetaLearningModule(mlp(hidden=(3,)), loss=loss)


class Unreduced(MetaLearningModule):
    def task_loss(self, params, batch):
        return (self.predict(params, batch[0]) - batch[1]) ** 2


def overridden():
    return Unreduced(mlp(hidden=(3,)))


# Everything a message must hold, besides what was expected.
CASES = {
    "labels above": (classifier, both(X, LABELS + 3), ["class labels between 0 and 4", "has 5 outputs", "labels from 3 to 7", "number the classes"]),
    "labels below": (classifier, both(X, LABELS - 1), ["class labels between 0 and 4", "labels from -1 to 3", "number the classes"]),
    "labels above in the query alone": (classifier, episodes((X, LABELS), (X, LABELS + 1)), ["between 0 and 4", "labels from 0 to 5"]),
    "labels with a dimension too many": (classifier, both(X, LABELS.unsqueeze(-1)), ["class labels (integer targets) of shape (5,)", "but got (5, 1)", "Squeeze"]),
    "labels as floats": (classifier, both(X, LABELS.float()), ["prediction has shape (5, 5) and the target (5,)", "y.long()"]),
    "fewer labels than inputs": (classifier, both(X, LABELS[:, :3]), ["of shape (5,)", "but got (3,)", "Squeeze"]),
    "integer targets of a regression": (regressor, both(X, Y.long()), ["integer targets", "but got (5, 1)", "y.float()"]),
    "integer inputs": (regressor, both(X.long(), Y), ["`support` holds torch.int64 (2, 5, 1) on cpu with values from 1 to 1", "torch.float32", "x.float()"]),
    "bytes as images": (small_conv, both(BYTES, LABELS), ["torch.uint8 (2, 5, 1, 28, 28)", "x.float() / 255"]),
    "floats for an embedding": (embedding, both(X[..., 0], Y), ["torch.float32 (2, 5) on cpu", "x.long()"]),
    "an index beyond the embedding": (embedding, both(LABELS, Y), ["values from 0 to 4", "num_embeddings - 1"]),
    "double inputs": (regressor, both(X.double(), Y), ["`support` holds torch.float64", "parameters are torch.float32 on cpu", "x.float()"]),
    "a double query": (regressor, episodes(query=(X.double(), Y.double())), ["`support` holds torch.float32", "`query` holds torch.float64", "x.float()"]),
    "a query of other features": (regressor, episodes(query=(torch.ones(2, 5, 3), Y)), ["`query` holds torch.float32 (2, 5, 3)", "Support and query go through one network"]),
    "a number for a task": (regressor, both(X[:, 0, 0], Y), ["`support` holds torch.float32 (2,) on cpu, torch.float32 (2, 5, 1)", "give x the shape (tasks, examples, features)"]),
    "images of other channels": (small_conv, both(torch.zeros(2, 5, 3, 28, 28), LABELS), ["torch.float32 (2, 5, 3, 28, 28)", "the shape its first layer takes"]),
    "fewer targets than inputs": (regressor, both(X, Y[:, :3]), ["prediction has shape (5, 1) and the target (3, 1)", "Reshape the targets"]),
    "an empty support set": (regressor, episodes(support=(X[:, :0], Y[:, :0])), ["`support` to hold at least one example per task", "[(2, 0, 1), (2, 0, 1)]", "Draw at least one shot"]),
    "an empty query set": (regressor, episodes(query=(X[:, :0], Y[:, :0])), ["`query` to hold at least one example per task", "Draw at least one shot"]),
    "no task": (regressor, both(X[:0], Y[:0]), ["`support`", "leading task dimension of at least 1", "[(0, 5, 1), (0, 5, 1)]", "unsqueeze(0)"]),
    "fewer tasks in the query": (regressor, episodes(query=(X[:1], Y[:1])), ["2 tasks in `support` and 1 in `query`", "Give every task both sets"]),
    "a list for a tensor": (regressor, both([1.0, 2.0], Y), ["`support` to hold tensors", "found float", "torch.stack"]),
    "a batch that is a tensor": (regressor, X, ["a batch to be an EpisodeBatch(support=(x, y), query=(x, y))", "Tensor of length 2", "collate_fn"]),
    "a batch that is a dict": (regressor, {"support": GOOD, "query": GOOD}, ["a batch to be an EpisodeBatch", "dict of length 2", "collate_fn"]),
    "inputs without targets": (regressor, (X, X), ["`support` and `query` to be the pair (x, y)", "Tensor of length 5", "override `task_loss`"]),
    "two shots of inputs without targets": (regressor, (X[:, :2], X[:, :2]), ["to be the pair (x, y)", "Tensor of length 2", "override `task_loss`"]),
    "three parts": (regressor, ((X, Y, Y), (X, Y, Y)), ["to be the pair (x, y)", "of length 3", "override `task_loss`"]),
    "nan in the inputs": (regressor, both(NAN, Y), ["to be finite", "nan or inf in `support`, tensor 0 (10 of 10 values)", "Drop or fill"]),
    "nan in the query's targets": (regressor, episodes(query=(X, NAN)), ["to be finite", "nan or inf in `query`, tensor 1 (10 of 10 values)", "Drop or fill"]),
    "a loss of one value an example": (with_loss(nn.MSELoss(reduction="none")), both(X, Y), ["loss of one task to be a scalar tensor", "torch.float32 of shape (5, 1)", "reduction='mean'"]),
    "a loss of shape (1,)": (with_loss(lambda p, y: (p - y).square().mean().reshape(1)), both(X, Y), ["scalar tensor", "of shape (1,)", "loss.mean()"]),
    "a loss that is a float": (with_loss(lambda p, y: 1.0), both(X, Y), ["scalar tensor", "but got 1.0", "without float() or item()"]),
    "a loss that is nothing": (with_loss(lambda p, y: None), both(X, Y), ["scalar tensor", "but got None", "Return what torch computed"]),
    "a loss that counts": (with_loss(lambda p, y: (p > y).sum()), both(X, Y), ["scalar tensor of floats", "torch.int64 of shape ()", "a count is no loss"]),
    "an overridden loss of one value an example": (overridden, both(X, Y), ["scalar tensor", "of shape (5, 1)", "reduction='mean'"]),
    "a network that returns a tuple": (recurrent, both(X, Y), ["the network to return a tensor", "but got tuple", "Return the prediction alone"]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_batch_that_does_not_fit_is_refused_in_our_words(case):
    make, batch, parts = CASES[case]
    with pytest.raises((ValueError, TypeError)) as caught:
        fit(make(), batch, 1)
    missing = [part for part in parts if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"


@pytest.mark.parametrize("case", ["labels above", "integer inputs", "nan in the inputs", "a loss that is a float"])
def test_a_guard_neither_hides_the_refusal_nor_makes_it(case):
    make, batch, parts = CASES[case]
    with (
        guard_warns(r"(check at step 0 failed\. Cause|could not be measured)"),
        pytest.raises((ValueError, TypeError)) as caught,
    ):
        fit(make(), batch, 1, [ConvergenceGuard(lookahead=LookaheadOptions(steps=0))])
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize(("returns", "source"), [(None, "argument `problem`"), (3, "argument `problem`")])
def test_a_guard_whose_problem_is_none_says_so_and_training_goes_on(returns, source):
    guard = ConvergenceGuard(problem=lambda module, batch: returns, lookahead=LookaheadOptions(steps=0))
    message = f"Expected {source} to return a MetaProblem but got {returns}. Return MetaProblem"
    with guard_warns(message):
        trainer = fit(regressor(), both(X, Y), 2, [guard])
    assert trainer.global_step == 2 and guard.history == []


def test_a_module_whose_meta_problem_is_none_is_told_of_its_method():
    class Forgetful(MetaLearningModule):
        def training_step(self, batch, batch_idx):
            return self.network(batch[0][0]).mean()

        def meta_problem(self, batch):
            return None

    with guard_warns("Expected `meta_problem` of Forgetful to return a MetaProblem but got None"):
        fit(Forgetful(mlp(hidden=(3,))), both(X, Y), 1, [ConvergenceGuard(lookahead=LookaheadOptions(steps=0))])


@pytest.mark.parametrize("part", ["support", "query"])
def test_data_on_another_device_are_named_with_theirs(part):
    found = regressor().meta_problem(episodes(**{part: (X.to("meta"), Y.to("meta"))}))
    for run in (lambda each: measure(each), regressor_step):
        with pytest.raises(BatchError) as caught:
            run(found)
        said = str(caught.value)
        assert f"`{part}` holds torch.float32 (2, 5, 1) on meta" in said, said
        assert "parameters are torch.float32 on cpu" in said and "Put all of them on one device" in said


def suggested(batch, module):
    return suggest_rates(module, DataLoader([batch] * 4, batch_size=None), batches=2, accelerator="cpu")


def test_rates_are_not_suggested_from_batches_without_values():
    for batch in (both(X.to("meta"), Y), both(X, Y.to("meta"))):
        with pytest.raises(ValueError, match=r"`datamodule` to give batches that hold values but got .*Build the data"):
            suggested(batch, regressor())
    with pytest.raises(BatchError, match=r"`support` holds torch.float32 \(2,\).*give x the shape \(tasks, examples"):
        suggested(both(X[:, 0, 0], Y), regressor())


def test_rates_are_suggested_from_batches_of_8_bit_floats():
    class Widened(MetaLearningModule):
        def predict(self, params, x):
            return super().predict(params, x.float())

        def task_loss(self, params, data):
            return super().task_loss(params, (data[0], data[1].float()))

    x = torch.linspace(-1, 1, 10).reshape(2, 5, 1)
    narrow = torch.float8_e4m3fn
    found = suggested(both(x.to(narrow), (2 * x).to(narrow)), Widened(mlp(hidden=(3,))))
    torch.manual_seed(0)
    wide = suggested(both(x.to(narrow).float(), (2 * x).to(narrow).float()), Widened(mlp(hidden=(3,))))
    assert math.isfinite(found.alpha) and found.notes == wide.notes
    with pytest.raises(BatchError, match=r"holds torch.float8_e4m3fn .*Give the inputs the parameters' dtype"):
        suggested(both(x.to(narrow), x.to(narrow)), regressor())


def test_an_error_that_utf_8_cannot_hold_is_reported(tmp_path):
    """As the name of a file that is not UTF-8 in an error's text."""

    def own(module, batch):
        raise ValueError("no file caf\udce9.png")

    guard = ConvergenceGuard(problem=own, lookahead=LookaheadOptions(steps=0))
    with guard_warns(r"no file caf\\udce9\.png"):
        fit(regressor(), both(X, Y), 1, [guard])
    page = guard.report(tmp_path / "run.html").read_text(encoding="utf-8")
    assert "no file caf\\udce9.png" in page and "\udce9" not in page


def regressor_step(found: MetaProblem) -> None:
    module = regressor()
    module.meta_problem = lambda batch: found
    module.training_step(None, 0)


@pytest.mark.parametrize("loss", [lambda p, d: d[0] * p["w"], lambda p, d: (d[0] * p["w"]).sum().reshape(1)])
@pytest.mark.parametrize("run", [measure, meta_gradient])
def test_a_vector_is_refused_where_a_problem_is_measured_too(loss, run):
    with pytest.raises(ValueError, match=r"loss of one task to be a scalar tensor .* of shape \(.,\).*loss\.mean\(\)"):
        run(problem(task_loss=loss))


def test_an_error_of_the_users_own_stays_what_it_is():
    class OwnError(RuntimeError):
        pass

    def loss(prediction, target):
        raise OwnError("a shape of my own")

    with pytest.raises(OwnError, match=r"^a shape of my own$"):
        fit(with_loss(loss)(), both(X, Y), 1)

    def plain(prediction, target):
        raise RuntimeError("the server said no")

    with pytest.raises(RuntimeError, match=r"^the server said no$"):
        fit(with_loss(plain)(), both(X, Y), 1)


def test_torchs_error_is_the_cause_and_its_type_still_catches_it():
    with pytest.raises(RuntimeError, match="torch said: mat1 and mat2 must have the same dtype") as caught:
        fit(regressor(), both(X.double(), Y), 1)
    assert isinstance(caught.value, ValueError) and "same dtype" in str(caught.value.__cause__)


def test_a_label_out_of_range_in_a_later_batch_is_still_named():
    module = classifier()
    fit(module, both(X, LABELS), 1)
    with pytest.raises(BatchError, match=r"Target 5 is out of bounds.*values from 5 to 9.*number the classes"):
        fit(module, both(X, LABELS + 5), 1)


def test_the_first_validation_batch_is_checked_as_well():
    module = classifier()
    with pytest.raises(BatchError, match=r"class labels between 0 and 4.*labels from 9 to 13"):
        module.validation_step(both(X, LABELS + 9), 0)


def test_what_looks_odd_and_is_right_trains():
    ignored = torch.tensor([0, 1, -100, 3, 4]).expand(2, 5)
    assert fit(classifier(), both(X, ignored), 1).global_step == 1

    def masked(prediction, target):
        return ((prediction - target.nan_to_num()) ** 2 * ~target.isnan()).mean()

    assert (
        fit(with_loss(masked)(), both(X, torch.where(torch.arange(5).view(5, 1) == 2, math.nan, Y)), 1).global_step == 1
    )
    exploding = MetaLearningModule(mlp(hidden=(3,)), inner_lr=1e30, inner_steps=5)
    assert (
        fit(exploding, both(X * 100, Y), 1).global_step == 1
    )  # finite data: the rates' doing, and the guard's business


def test_values_are_read_before_the_first_step_alone():
    module = classifier()
    fit(module, both(X, LABELS), 1)
    found = module.meta_problem(both(X.to("meta"), LABELS.to("meta")))  # reading a value of these would raise
    assert found.tasks == 2 and module._first_batch.labels is None
