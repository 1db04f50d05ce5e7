"""A profile by hand, and that measuring leaves no trace. (Predictions against what is measured: test_attached.py.)"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ds_activation.blocks import find_blocks
from ds_activation.choice import Decision, Held
from ds_activation.forwards import attach_forwards
from ds_activation.profile import Measurement, profile
from ds_activation.rng import get_cuda_rng_tracker
from ds_core.errors import EngineError

KEEP, RECOMPUTE, SELECTIVE, OFFLOAD = Decision.KEEP, Decision.RECOMPUTE, Decision.SELECTIVE, Decision.OFFLOAD
CPU = torch.device("cpu")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 16, bias=False), nn.Linear(16, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.two(F.gelu(self.one(x)))


def profiled(model: nn.Module, x: torch.Tensor) -> Any:
    return profile(model, (x,), {}, find_blocks(model, ()))


def test_by_hand() -> None:
    found = profiled(nn.Sequential(Block(), Block()), torch.zeros(2, 4))
    assert found.blocks == ("0", "1")
    # The model's input, what the first block gives the second, and what that one gives.
    assert found.storages == (2 * 4 * 4,) * 3
    assert found.rest == (frozenset(),) * 3
    wide = 2 * 16 * 4
    for at, call in enumerate(found.calls):
        given = frozenset({at})
        assert call.block == at
        # The first matrix product saves its input, gelu the first result, the second product what gelu gave.
        assert call.costs[KEEP].held == call.costs[KEEP].at_work == Held(given, 2 * wide)
        assert (call.costs[RECOMPUTE].held, call.costs[RECOMPUTE].at_work) == (Held(given), Held(given, 2 * wide))
        assert call.costs[KEEP].seconds == 0
        # Both products' results are kept; the last one is what the block gives.
        assert call.costs[SELECTIVE].held == Held(frozenset({at, at + 1}), wide)
        assert call.costs[SELECTIVE].at_work == Held(frozenset({at, at + 1}), 2 * wide)
        assert OFFLOAD not in call.costs


def test_what_others_hold_is_counted_apart() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.h = nn.ModuleList([Block(), Block()])
            self.scale = torch.full((2, 4), 2.0)  # neither parameter nor buffer nor argument

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.h:
                x = block(x).tanh()
            return x * self.scale

    model = Model()
    found = profiled(model, torch.zeros(2, 4))
    # Tanh saves its result, which is the second block's input; the product with a constant saves the constant.
    assert [len(rest) for rest in found.rest] == [0, 1, 2]
    assert found.calls[1].costs[RECOMPUTE].held.shared == found.rest[1]


def test_no_trace_is_left() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)) for _ in range(2)))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tracker = get_cuda_rng_tracker()
    tracker.add("test", 3)
    state, states = torch.get_rng_state(), tracker.get_states()
    profiled(model, torch.randn(8, 4).detach())
    torch.set_rng_state(state)
    profiled(model, torch.zeros(8, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert tracker.get_states() == states
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(param.grad is None for param in model.parameters())
    tracker.reset()


def test_forwards_are_put_back_after_an_error() -> None:
    model = nn.Sequential(Block(), Block())
    with pytest.raises(RuntimeError, match="shapes"):
        profiled(model, torch.zeros(2, 3))
    assert all("forward" not in vars(block) for block in model)


def test_an_input_changed_in_place_is_named() -> None:
    class Changing(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.mul_(2))

    with pytest.raises(EngineError, match="changes an input in place") as caught:
        profiled(nn.Sequential(Changing(), Changing()), torch.zeros(2, 4))
    assert caught.value.where == "0"


def test_a_kept_result_changed_in_place_rules_selective_out() -> None:
    class Changing(Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.two(F.relu(self.one(x), inplace=True))

    (first, second) = profiled(nn.Sequential(Changing(), Block(), Changing()), torch.zeros(2, 4)).calls
    assert SELECTIVE not in first.costs
    assert set(second.costs) == {KEEP, RECOMPUTE}


def test_offload_leaves_inputs_where_they_are() -> None:
    model = nn.Sequential(Block(), Block())
    measurement = Measurement(model, ["0", "1"], CPU, can_offload=True)
    forwards = attach_forwards(find_blocks(model, ()), [RECOMPUTE] * 2)
    for forward in forwards:
        forward.measurement = measurement
    with measurement:
        output = model(torch.zeros(2, 4))
        found = measurement.result()
    for at, call in enumerate(found.calls):
        assert call.costs[OFFLOAD].held == Held(frozenset({at}))
        assert call.costs[OFFLOAD].at_work == call.costs[KEEP].held
    output.sum().backward()  # what was measured is left as it is computed again
    assert all(param.grad is not None for param in model.parameters())


def test_a_block_inside_another_is_part_of_it() -> None:
    inner = Block()

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return inner(self.own(x))

    model = nn.Sequential(Outer(), Outer())
    found = profile(model, (torch.zeros(2, 4),), {}, [*find_blocks(model, ()), ("inner", inner)])
    assert [call.block for call in found.calls] == [0, 1]
