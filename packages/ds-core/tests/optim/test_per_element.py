"""The rule itself; what follows from it is tested with slots, clients' optimizers and fragments."""

from __future__ import annotations

import pytest
import torch

import ds_core
from ds_core.optim.per_element import is_per_element, of_whole_parameters, shapes_in
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.utils import safe_get_full_optimizer_state


def test_one_element_is_what_it_is_of_the_other_parameters() -> None:
    matrix, scalar = torch.zeros(2, 3), torch.zeros(())
    state = {
        matrix: {"moment": torch.zeros(2, 3), "factor": torch.zeros(2), "ratio": torch.zeros(()), "name": "a"},
        scalar: {name: torch.zeros(()) for name in ("moment", "factor", "ratio", "step")},
        "of all": 1,
    }
    of_whole = of_whole_parameters(shapes_in(state))
    assert of_whole == {"factor", "ratio", "step"}
    assert {name for name in state[scalar] if is_per_element(name, (), (), of_whole)} == {"moment"}
    assert is_per_element("moment", torch.Size((2, 3)), (2, 3), of_whole)
    # Of two elements a shape that is the same is no accident.
    assert is_per_element("factor", (2,), (2,), of_whole)


def test_without_other_parameters_a_step_is_a_count() -> None:
    of_whole = of_whole_parameters([("step", (), ()), ("exp_avg", (), ())])
    assert [name for name in ("step", "exp_avg") if is_per_element(name, (), (), of_whole)] == ["exp_avg"]


class Counts(torch.optim.Optimizer):
    """Keeps a whole number per parameter, which fp32 cannot hold."""

    def __init__(self, params) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["number"] = torch.tensor(2**24 + 1)
                self.state[param]["moment"] = torch.ones_like(param)


@pytest.mark.usefixtures("one_process")
def test_fragments_follow_it_for_one_element() -> None:
    model = torch.nn.Linear(3, 2)
    model.scale = torch.nn.Parameter(torch.ones(()))
    engine = ds_core.initialize(model=model, optimizer=Counts, config={"train_batch_size": 1})[0]
    engine.backward((engine(torch.ones(1, 3)) * model.scale).sum())
    engine.step()
    for param in (model.weight, model.scale):
        assert safe_get_full_optimizer_state(param, "number") == 2**24 + 1
        assert torch.equal(safe_get_full_optimizer_state(param, "moment"), torch.ones_like(param))
    engine.destroy()
