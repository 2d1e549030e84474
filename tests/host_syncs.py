"""Counts on the CPU what would make the host wait for a CUDA device."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "unique_consecutive"}


class HostSyncs(TorchDispatchMode):
    """Follows tensors as if those given lay on a device, and notes where a value of one comes to the host.

    What an operation makes of a device tensor is on the device; ``.cpu()`` of one is a wait and gives a host tensor.
    Numbers read from a device tensor (``item``, ``float``, ``bool``, ``tolist``), ``nonzero``, ``equal`` and boolean
    masks are waits. Copies to the device are not: nothing is read.

    Args:
        on_device: Pytree with the tensors that would be on the device.
    """

    def __init__(self, on_device: Any) -> None:
        super().__init__()
        self._device: dict[int, bool] = {}
        self._kept = [leaf for leaf in tree_leaves(on_device) if isinstance(leaf, torch.Tensor)]
        for tensor in self._kept:
            self._device[self._key(tensor)] = True
        self.sites: list[str] = []

    @property
    def count(self) -> int:
        """Waits so far."""
        return len(self.sites)

    @staticmethod
    def _key(tensor: torch.Tensor) -> int:
        return tensor.untyped_storage()._cdata

    def _is_device(self, tensor: Any) -> bool:
        return isinstance(tensor, torch.Tensor) and self._device.get(self._key(tensor), False)

    def _note(self) -> None:
        frame: Any = sys._getframe()
        while frame is not None and not self._ours(frame.f_code.co_filename):
            frame = frame.f_back
        where = "elsewhere" if frame is None else f"{frame.f_code.co_filename.rsplit('/', 1)[-1]}:{frame.f_lineno}"
        self.sites.append(where)

    @staticmethod
    def _ours(file: str) -> bool:
        return "lightning_maml_guard" in file and not file.endswith("backward.py")  # its mode stands over every call

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        here = any(self._is_device(leaf) for leaf in leaves)
        name = function.overloadpacket.__name__
        if here and (name in _WAITING or (name in {"index", "index_put", "index_put_"} and self._masked(leaves))):
            self._note()
        here = here and name != "lift_fresh"  # torch.tensor(...): a new one, where memory of an old one may lie
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._device[self._key(each)] = here
        return made

    @staticmethod
    def _masked(leaves: list[Any]) -> bool:
        return any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in leaves[1:])

    def __enter__(self):
        self._cpu, self._tolist = torch.Tensor.cpu, torch.Tensor.tolist
        syncs = self

        def cpu(tensor, *arguments, **options):
            if not syncs._is_device(tensor):
                return syncs._cpu(tensor, *arguments, **options)
            syncs._note()
            copied = tensor.clone()
            syncs._device[syncs._key(copied)] = False
            return copied

        def tolist(tensor):
            return syncs._tolist(tensor.cpu())

        torch.Tensor.cpu, torch.Tensor.tolist = cpu, tolist
        return super().__enter__()

    def __exit__(self, *error):
        torch.Tensor.cpu, torch.Tensor.tolist = self._cpu, self._tolist
        return super().__exit__(*error)
