"""Count the bytes of live tensor storages: what a program holds, whatever an allocator or the system makes of it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    is_traceable_wrapper_subclass,
    is_traceable_wrapper_subclass_type,
)
from torch.utils._pytree import tree_leaves

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor, UntypedStorage

__all__ = ["LiveStorage"]


@dataclass
class _Entry:
    ref: weakref.ref[UntypedStorage]
    nbytes: int
    label: str


class LiveStorage(TorchDispatchMode):
    """Counts storages that ops make while it is entered, from their creation to the moment they are freed.

    Each storage counts once, however many views it has, and as large as it is now: in-place ops and views add
    nothing. Forward, backward (custom functions and accumulated gradients too), optimizer steps and what collectives
    return are all seen. What existed before is not counted, until :meth:`track` is told of it.

    What it cannot see:

    - memory that never becomes a tensor outside one kernel: the scratch space of a convolution or of a fused
      optimizer step, the buffers inside gloo or NCCL, buffers of a graph compiled by inductor;
    - tensors made by other Python threads, and those that come from no op, such as ``torch.from_numpy``:
      :meth:`track` them. The counter sees them freed;
    - tensors on the meta device and fake ones, which hold nothing, count nothing.

    Entering it again begins anew. While it is entered ``UntypedStorage.resize_`` is wrapped, since resizing a storage
    is no op.

    >>> with LiveStorage() as live:
    ...     kept = torch.zeros(4) + torch.ones(4)
    >>> live.live_bytes, live.peak_bytes
    (16, 48)
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        """Bytes of the storages alive now; after the end of the ``with`` block, of those alive then."""
        self.peak_bytes = 0
        """The highest :attr:`live_bytes` since the start or :meth:`reset_peak`."""
        self.at_peak: dict[str, int] = {}
        """:attr:`by_label` as it was when :attr:`peak_bytes` was reached."""
        self._label = ""
        self._labels_at_end: dict[str, int] = {}
        self._entries: dict[int, _Entry] = {}
        # Storages are freed wherever the last reference goes, also in the threads of autograd and in the midst of
        # this class's own code.
        self._lock = threading.RLock()
        self._resize: Callable[..., Any] | None = None

    @property
    def by_label(self) -> dict[str, int]:
        """Live bytes by the label storages were made or tracked under; ``""`` where there was none."""
        with self._lock:
            found = dict(self._labels_at_end)
            for entry in list(self._entries.values()):
                found[entry.label] = found.get(entry.label, 0) + entry.nbytes
            return found

    def reset_peak(self) -> None:
        """Begin a new measurement of :attr:`peak_bytes` from what is live now."""
        self.peak_bytes, self.at_peak = self.live_bytes, self.by_label

    @contextmanager
    def label(self, name: str) -> Iterator[None]:
        """Put storages made inside under ``name``; the innermost label wins."""
        before, self._label = self._label, name
        try:
            yield
        finally:
            self._label = before

    def track(self, obj: Any, label: str | None = None) -> None:
        """Count ``obj`` in, if it is not; with a label, move it there.

        Args:
            obj: a tensor (with its gradient), a module (parameters, their gradients, buffers), an optimizer (its
                state, not the parameters), or a mapping or iterable of such; other values in them are skipped.
            label: None: the label it has, else the one in force.
        """
        for tensor in _tensors_of(obj):
            for storage in _storages(tensor):
                known = self._entries.get(storage._cdata)
                if known is None:
                    self._add(storage, self._label if label is None else label)
                elif label is not None:
                    known.label = label

    def __enter__(self) -> LiveStorage:
        super().__enter__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self.at_peak, self._labels_at_end = {}, {}
        self._resize = torch.UntypedStorage.resize_
        torch.UntypedStorage.resize_ = self._resizing(self._resize)  # type: ignore[method-assign]
        return self

    def __exit__(self, *exc: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[assignment, method-assign]
        with self._lock:
            # Without its weak references nothing is counted any more; the numbers stay.
            self._labels_at_end = self.by_label
            self._entries.clear()
        super().__exit__(*exc)  # type: ignore[no-untyped-call]

    def _resizing(self, resize: Callable[..., Any]) -> Callable[..., Any]:
        def resize_(storage: UntypedStorage, nbytes: int) -> Any:
            result = resize(storage, nbytes)
            self._measure(storage)
            return result

        return resize_

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if any(is_traceable_wrapper_subclass_type(cls) for cls in types):
            # Such as a DTensor: its own dispatch comes first, and this sees the ops on the tensors inside.
            return NotImplemented
        kwargs = kwargs or {}
        # torch.tensor() makes its tensor outside of any op and passes it to this one.
        is_new = func is torch.ops.aten.lift_fresh.default
        given = {} if is_new else {s._cdata: s for leaf in tree_leaves((args, kwargs)) for s in _storages(leaf)}
        result = func(*args, **kwargs)
        for leaf in tree_leaves(result):
            for storage in _storages(leaf):
                if storage._cdata in self._entries:
                    self._measure(storage)
                elif storage._cdata not in given:
                    self._add(storage, self._label)
        if func._schema.is_mutable:
            # An op that returns nothing may have resized what it was given.
            for storage in given.values():
                self._measure(storage)
        return result

    def _add(self, storage: UntypedStorage, label: str) -> None:
        key = storage._cdata
        with self._lock:
            self._entries[key] = _Entry(weakref.ref(storage, lambda _: self._free(key)), 0, label)
            self._measure(storage)

    def _measure(self, storage: UntypedStorage) -> None:
        with self._lock:
            entry = self._entries.get(storage._cdata)
            if entry is None:
                return
            now = storage.nbytes()
            self.live_bytes += now - entry.nbytes
            entry.nbytes = now
            if self.live_bytes > self.peak_bytes:
                self.peak_bytes, self.at_peak = self.live_bytes, self.by_label

    def _free(self, key: int) -> None:
        with self._lock:
            entry = self._entries.pop(key, None)
            if entry is not None:
                self.live_bytes -= entry.nbytes


def _storages(value: Any) -> Iterator[UntypedStorage]:
    """Yield the storages with memory behind them that ``value`` has, if it is a tensor."""
    if not isinstance(value, torch.Tensor):
        return
    if is_traceable_wrapper_subclass(value):
        for name in value.__tensor_flatten__()[0]:
            yield from _storages(getattr(value, name))
    elif value.layout is torch.sparse_coo:
        yield from _storages(value._indices())
        yield from _storages(value._values())
    elif torch._C._has_storage(value):
        storage = value.untyped_storage()
        # Of the storage, not of the tensor: a fake tensor says "cpu" and has its storage on meta.
        if storage.device.type != "meta":
            yield storage


def _tensors_of(obj: Any) -> Iterator[Tensor]:
    if isinstance(obj, torch.Tensor):
        yield obj
        if obj.is_leaf and obj.grad is not None:
            yield obj.grad
    elif isinstance(obj, torch.nn.Module):
        for tensor in (*obj.parameters(), *obj.buffers()):
            yield from _tensors_of(tensor)
    elif isinstance(obj, torch.optim.Optimizer):
        yield from _tensors_of(obj.state.values())
    elif isinstance(obj, Mapping):
        yield from _tensors_of(obj.values())
    elif isinstance(obj, Iterable) and not isinstance(obj, str | bytes):
        for value in obj:
            yield from _tensors_of(value)
