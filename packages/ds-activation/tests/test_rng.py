"""Random states by name, on the device of the accelerator in use."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch

from ds_activation import rng
from ds_activation.rng import (
    MODEL_PARALLEL,
    CudaRNGStatesTracker,
    get_cuda_rng_tracker,
    replay,
    seed_device,
    seeded_state,
    set_device_state,
)
from ds_core.errors import EngineError

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    get_cuda_rng_tracker().reset()


def drawn(seed: int) -> torch.Tensor:
    return torch.rand(3, generator=torch.Generator().manual_seed(seed))


def test_a_fork_draws_from_its_state_and_goes_on_there() -> None:
    tracker = CudaRNGStatesTracker()
    torch.manual_seed(1)
    tracker.add("a", 5)
    tracker.add(MODEL_PARALLEL, 6)
    both = torch.rand(6, generator=torch.Generator().manual_seed(5))
    with tracker.fork("a"):
        first = torch.rand(3)
        with tracker.fork():
            assert torch.equal(torch.rand(3), drawn(6))
    assert torch.equal(torch.rand(3), drawn(1)), "the outer state is untouched"
    with tracker.fork("a"):
        assert torch.equal(torch.cat([first, torch.rand(3)]), both)


def test_a_fork_puts_the_outer_state_back_after_an_error() -> None:
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 5)
    torch.manual_seed(1)

    def failing() -> None:
        with tracker.fork("a"):
            torch.rand(3)
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert torch.equal(torch.rand(3), drawn(1))
    with tracker.fork("a"):
        assert torch.equal(torch.rand(3), torch.rand(6, generator=torch.Generator().manual_seed(5))[3:])


@pytest.mark.parametrize(("name", "seed", "text"), [("a", 6, "called 'a' already"), ("b", 5, "seed 5 was added")])
def test_a_failed_add_changes_nothing(name: str, seed: int, text: str) -> None:
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 5)
    before = tracker.get_states(), set(tracker.seeds_)
    with pytest.raises(EngineError, match=text):
        tracker.add(name, seed)
    assert (tracker.get_states(), tracker.seeds_) == before
    tracker.add("c", 6)


def test_names_that_are_not_there() -> None:
    tracker = CudaRNGStatesTracker()
    with pytest.raises(EngineError, match="no random state called 'model-parallel-rng'") as caught, tracker.fork():
        pass
    assert "model_parallel_cuda_manual_seed" in str(caught.value)
    tracker.add("a", 1)
    with pytest.raises(EngineError, match="'a'"):
        tracker.reseed("b", 2)


def test_states_are_copied_out_and_put_in_place_of_all() -> None:
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    states = tracker.get_states()
    states["b"] = seeded_state(2)
    assert list(tracker.get_states()) == ["a"]
    tracker.set_states(states)
    assert list(tracker.states_) == ["a", "b"]
    tracker.reset()
    assert (tracker.states_, tracker.seeds_) == ({}, set())


def test_replay_puts_back_what_was() -> None:
    tracker = get_cuda_rng_tracker()
    tracker.add("a", 1)
    before = tracker.get_states()
    with tracker.fork("a"):
        torch.rand(3)
    now = tracker.get_states()
    with replay(before), tracker.fork("a"):
        assert torch.equal(torch.rand(3), drawn(1))
    assert torch.equal(tracker.get_states()["a"], now["a"])
    assert get_cuda_rng_tracker() is tracker


def test_states_of_the_device() -> None:
    set_device_state(seeded_state(4), "cpu")
    assert torch.equal(torch.rand(3), drawn(4))
    seed_device(9)
    assert torch.equal(torch.rand(3), drawn(9))


class Device:
    """A device with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator()
        self.get_rng_state = self.generator.get_state
        self.manual_seed = self.generator.manual_seed
        self.set_on: list[object] = []

    def set_rng_state(self, state: torch.Tensor, *device: object) -> None:
        self.set_on += device
        self.generator.set_state(state)


def test_a_device_that_is_no_cpu_has_its_own_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(rng, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: "fake"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind: device)
    torch.manual_seed(1)
    seed_device(2)
    tracker = CudaRNGStatesTracker()
    tracker.add("a", 5)
    with tracker.fork("a"):
        assert torch.equal(torch.rand(3, generator=device.generator), drawn(5))
    assert torch.equal(torch.rand(3, generator=device.generator), drawn(2))
    assert torch.equal(torch.rand(3), drawn(1)), "the host's is untouched"
    set_device_state(seeded_state(7), "fake:1")
    assert device.set_on == ["fake:1"]
