"""Storages of tensors, what autograd holds of them, and names for them that live as long as they do."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from ds_activation.host_copies import Handle

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, UntypedStorage, nn

__all__ = ["StorageNumbers", "SavedTensors", "fixed_storages", "storages_of"]


def storages_of(*values: Any) -> Iterator[UntypedStorage]:
    """Yield the storages with memory behind them of all tensors in ``values``, containers looked into."""
    for value in tree_leaves(values):
        if not isinstance(value, torch.Tensor):
            continue
        if is_traceable_wrapper_subclass(value):
            yield from storages_of(*(getattr(value, name) for name in value.__tensor_flatten__()[0]))
        elif value.layout is torch.sparse_coo:
            yield from storages_of(value._indices(), value._values())
        elif torch._C._has_storage(value):
            storage = value.untyped_storage()
            if storage.device.type != "meta" and storage.nbytes():
                yield storage


def fixed_storages(module: nn.Module) -> frozenset[int]:
    """Return the storages of parameters and buffers: they are there whatever a forward saves."""
    return frozenset(storage._cdata for storage in storages_of(*module.parameters(), *module.buffers()))


class StorageNumbers:
    """Numbers storages from 0, as they are met."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._numbers: dict[int, tuple[weakref.ref[UntypedStorage], int]] = {}

    def number(self, storage: UntypedStorage) -> int:
        """Return the number of ``storage``, a new one if it has none."""
        known = self._numbers.get(storage._cdata)
        # Another storage may have taken the place of one that is gone.
        if known is None or known[0]() is None:
            known = weakref.ref(storage), len(self.sizes)
            self._numbers[storage._cdata] = known
            self.sizes.append(storage.nbytes())
        return known[1]


class SavedTensors:
    """Notes which tensors autograd saves while :meth:`hooks` is entered, for as long as it holds them."""

    def __init__(self) -> None:
        self._packed: weakref.WeakSet[_Packed] = weakref.WeakSet()
        self._count = 0
        self.place = 0
        """Noted with each tensor."""
        self.is_on = True

    def hooks(self) -> Any:
        """Return the context, a new one each time."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def alive(self) -> list[tuple[int, Tensor]]:
        """Return what autograd still holds, with the place it was saved at, in the order of saving."""
        return [(one.place, one.tensor) for one in sorted(self._packed, key=lambda one: one.at)]

    def _pack(self, tensor: Tensor) -> Any:
        if not self.is_on:
            return Handle(tensor)
        self._count += 1
        packed = _Packed(tensor, self.place, self._count)
        self._packed.add(packed)
        return packed


class _Packed(Handle):
    def __init__(self, tensor: Tensor, place: int, at: int) -> None:
        super().__init__(tensor)
        self.place, self.at = place, at

    @property
    def tensor(self) -> Tensor:
        return self._tensor


def _unpack(packed: Handle) -> Tensor:
    return packed.restore()
