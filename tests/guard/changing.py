"""Batches of many types, and training steps that change them: pop, overwrite, write in place."""

from collections import UserDict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_maml_guard import MetaProblem
from lightning_maml_guard.utils.lightning_compat import LightningModule

BATCHES = ("dict", "encoding", "mapping", "graph", "dataclass", "in place")


class Encoding(UserDict):
    """As the BatchEncoding of transformers."""

    def to(self, device):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


class Store(Mapping):
    """A Mapping with a dict of its own inside, as graph libraries have."""

    def __init__(self, held):
        self._held = dict(held)

    def __getitem__(self, key):
        return self._held[key]

    def __iter__(self):
        return iter(self._held)

    def __len__(self):
        return len(self._held)

    def pop(self, key):
        return self._held.pop(key)


class Graph:
    """As torch_geometric's Data: attributes kept in a store."""

    def __init__(self, x, y):
        self.__dict__["_store"] = Store({"x": x, "y": y})

    def __getattr__(self, name):
        if name.startswith("_"):
            raise AttributeError(name)
        return self._store[name]

    def __setattr__(self, name, value):
        self._store._held[name] = value

    def clone(self):
        return Graph(self.x.clone(), self.y.clone())

    def to(self, device, non_blocking=False):
        self.x, self.y = self.x.to(device), self.y.to(device)
        return self


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


MAKE = {
    "dict": lambda x, y: {"x": x, "y": y},
    "encoding": lambda x, y: Encoding(x=x, y=y),
    "mapping": lambda x, y: Store({"x": x, "y": y}),
    "graph": Graph,
    "dataclass": Pair,
    "in place": lambda x, y: {"x": x, "y": y},
}
SCALE = 10.0


def taken(kind, batch):
    """What a training step makes of its batch; the batch is not what it was."""
    if kind in ("dict", "encoding", "mapping"):
        y = batch.pop("y")
        return batch["x"] / SCALE, y
    if kind == "in place":
        return batch["x"].div_(SCALE), batch["y"]
    batch.x = batch.x / SCALE
    return batch.x, batch.y


class Fresh(Dataset):
    """Makes each batch anew, so that an epoch is not given what the last one left."""

    def __init__(self, kind, count):
        self.kind, self.count = kind, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        x = SCALE * torch.randn(16, 4, generator=torch.Generator().manual_seed(index))
        return MAKE[self.kind](x, (x[:, :1] / SCALE).sin())


def loader(kind, count):
    return DataLoader(Fresh(kind, count), batch_size=None, collate_fn=lambda batch: batch)


class Changing(LightningModule):
    """A network of one hidden layer, by automatic or manual optimisation."""

    def __init__(self, kind, *, lr=0.1, manual=False, take=taken):
        super().__init__()
        self.kind, self.lr, self.take = kind, lr, take
        self.automatic_optimization = not manual
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 1))
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = self.take(self.kind, batch)
        loss = F.mse_loss(self.net(x), y)
        self.losses.append(float(loss.detach()))
        self.log("train/loss", loss)
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.5)


def problem(module, batch):
    """The same loss as a problem of one task; stating it changes the batch as well."""
    data = tuple(part.unsqueeze(0) for part in module.take(module.kind, batch))

    def task_loss(params, pair):
        return F.mse_loss(torch.func.functional_call(module.net, params, (pair[0],)), pair[1])

    return MetaProblem(dict(module.net.named_parameters()), task_loss, data, data, inner_lr=0.0)
