"""Random states by name, for layers whose random numbers differ between ranks, and their replay in recomputation.

The device's generator is that of the accelerator in use: torch's own on a CPU.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch

from ds_core.accelerator import get_accelerator
from ds_core.errors import EngineError, few

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

__all__ = [
    "MODEL_PARALLEL",
    "CudaRNGStatesTracker",
    "get_cuda_rng_tracker",
    "replay",
    "seed_device",
    "seeded_state",
    "set_device_state",
]

MODEL_PARALLEL = "model-parallel-rng"
"""The state that :meth:`CudaRNGStatesTracker.fork` takes where no name is given."""


class CudaRNGStatesTracker:
    """Random states of the device by name; :meth:`fork` runs a block of code with one of them.

    >>> tracker = CudaRNGStatesTracker()
    >>> tracker.add("dropout", 5)
    >>> with tracker.fork("dropout"):
    ...     first = torch.rand(2)
    >>> sorted(tracker.get_states())
    ['dropout']
    """

    def __init__(self) -> None:
        self.states_: dict[str, Tensor] = {}
        """Name -> state; replaced, never written to."""
        self.seeds_: set[int] = set()
        """Seeds that were added: two states of one seed would be the same numbers."""

    def reset(self) -> None:
        """Forget all states."""
        self.states_ = {}
        self.seeds_ = set()

    def get_states(self) -> dict[str, Tensor]:
        """Return name -> state; the dictionary is the caller's."""
        return dict(self.states_)

    def set_states(self, states: Mapping[str, Tensor]) -> None:
        """Have ``states`` in place of all there are."""
        self.states_ = dict(states)

    def add(self, name: str, seed: int) -> None:
        """Add a state called ``name`` that begins at ``seed``; the device's own state is left as it is.

        Raises:
            EngineError: the name or the seed is taken; nothing was added.
        """
        if name in self.states_:
            raise EngineError(
                f"there is a random state called {name!r} already",
                where="CudaRNGStatesTracker.add",
                fix="take another name, or call reset() first",
            )
        if seed in self.seeds_:
            raise EngineError(
                f"seed {seed} was added already: two states of one seed give the same numbers",
                where=f"CudaRNGStatesTracker.add({name!r}, {seed})",
                fix="take another seed, or call reset() first",
            )
        self.states_[name] = seeded_state(seed)
        self.seeds_.add(seed)

    def reseed(self, name: str, seed: int) -> None:
        """Let the state called ``name`` begin anew at ``seed``.

        Raises:
            EngineError: there is none.
        """
        self._state(name)
        self.states_[name] = seeded_state(seed)
        self.seeds_.add(seed)

    @contextmanager
    def fork(self, name: str = MODEL_PARALLEL) -> Iterator[None]:
        """Run the body with the state called ``name``, which goes on from there at the next fork.

        Raises:
            EngineError: there is none.
        """
        state = self._state(name)
        outer = device_state()
        set_device_state(state)
        try:
            yield
        finally:
            self.states_[name] = device_state()
            set_device_state(outer)

    def _state(self, name: str) -> Tensor:
        if name not in self.states_:
            raise EngineError(
                f"there is no random state called {name!r}",
                where=f"CudaRNGStatesTracker, which has {few(sorted(self.states_))}",
                fix=f"add({name!r}, seed) first"
                + (", which model_parallel_cuda_manual_seed(seed) does" if name == MODEL_PARALLEL else ""),
            )
        return self.states_[name]


_tracker = CudaRNGStatesTracker()


def get_cuda_rng_tracker() -> CudaRNGStatesTracker:
    """Return the tracker of this process."""
    return _tracker


@contextmanager
def replay(states: Mapping[str, Tensor]) -> Iterator[None]:
    """Run the body with the process's tracker at ``states``; what it had is put back afterwards."""
    now = _tracker.get_states()
    _tracker.set_states(states)
    try:
        yield
    finally:
        _tracker.set_states(now)


def device_state() -> Tensor:
    """Return a copy of the random state of the current device."""
    kind = get_accelerator().device_name()
    state: Tensor = torch.get_rng_state() if kind == "cpu" else torch.get_device_module(kind).get_rng_state()
    return state


def set_device_state(new_state: Tensor, device: int | str | torch.device = -1) -> None:
    """Give a device the random state ``new_state``.

    Args:
        new_state: ``[N]`` bytes on the CPU; not kept.
        device: -1 is the current one; a CPU has one only.
    """
    kind = get_accelerator().device_name()
    if kind == "cpu":
        torch.set_rng_state(new_state)
    elif device == -1:
        torch.get_device_module(kind).set_rng_state(new_state)
    else:
        torch.get_device_module(kind).set_rng_state(new_state, device)


def seed_device(seed: int) -> None:
    """Seed the current device alone."""
    kind = get_accelerator().device_name()
    if kind == "cpu":
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every device
    else:
        torch.get_device_module(kind).manual_seed(seed)


def seeded_state(seed: int) -> Tensor:
    """Return the state the device has after it was seeded; its own is left as it is."""
    outer = device_state()
    try:
        seed_device(seed)
        return device_state()
    finally:
        set_device_state(outer)
