"""Runs of a block that leave no trace: random states and buffers put back, timed, what happens inside noted."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ds_activation.host_copies import HostCopies
from ds_activation.rng import get_cuda_rng_tracker
from ds_activation.selective import is_kept
from ds_activation.storages import storages_of
from ds_core.accelerator import get_accelerator

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

__all__ = ["Tally", "as_before", "seconds_per_byte", "timed"]

_PROBE_BYTES = 2**24


class Tally(TorchDispatchMode):
    """Notes the results that selective recomputation keeps, and whether any is changed afterwards."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: list[Tensor] = []
        self.is_changed = False
        self._keys: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if is_kept(func, args, kwargs):
            self.results += [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self._keys.update(storage._cdata for storage in storages_of(result))
        elif func._schema.is_mutable and self._keys:
            changed = [
                value
                for argument, value in zip(func._schema.arguments, args, strict=False)
                if argument.alias_info is not None and argument.alias_info.is_write
            ]
            self.is_changed |= any(storage._cdata in self._keys for storage in storages_of(changed))
        return result


@contextmanager
def as_before(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Put random states, and the buffers of ``module``, back at the end."""
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    tracker = get_cuda_rng_tracker()
    states = tracker.get_states()
    devices = [] if device.type == "cpu" else [device]
    kind = "cuda" if device.type == "cpu" else device.type
    with torch.random.fork_rng(devices=devices, device_type=kind):
        try:
            yield
        finally:
            tracker.set_states(states)
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    # Past its version counter: autograd may hold the buffer since an earlier call of the block.
                    buffer.data.copy_(before)


def timed(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    device: torch.device,
    contexts: Sequence[Any],
) -> tuple[Any, float]:
    """Return what ``function`` returns within ``contexts``, and the seconds that it takes, its device waited for."""
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        _wait(device)
        start = time.perf_counter()
        output = function(*args, **kwargs)
        _wait(device)
        seconds = time.perf_counter() - start
    return output, seconds


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        get_accelerator().synchronize(device.index)


def seconds_per_byte(device: torch.device) -> tuple[float, float]:
    """Return how long a copy to the host and one back take, the better of two."""
    # Copies that are waited for, and a tensor that does leave the device.
    copies = HostCopies(keep_last=0, use_streams=False)
    probe = torch.zeros(_PROBE_BYTES, dtype=torch.uint8, device=device)
    there = back = float("inf")
    for _ in range(2):
        _wait(device)
        start = time.perf_counter()
        handle = copies.to_host(probe)
        _wait(device)
        middle = time.perf_counter()
        handle.restore()
        _wait(device)
        there, back = min(there, middle - start), min(back, time.perf_counter() - middle)
    return there / _PROBE_BYTES, back / _PROBE_BYTES
