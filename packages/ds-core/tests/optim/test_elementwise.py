"""Which optimizers may be given any part of a parameter: what is declared is true, and nothing else is taken for it."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ds_core import registry
from ds_core.optim.build import find_optimizer
from ds_core.optim.elementwise import OF_TORCH, WHOLE_OF_TORCH, elementwise, is_elementwise, known_of
from ds_core.testing.optimizer import is_same_update, updated_in_pieces

OPTIONS = {
    "momentum": (0.0, 0.9),
    "weight_decay": (0.0, 0.25),
    "nesterov": (False, True),
    "amsgrad": (False, True),
    "centered": (False, True),
    "maximize": (False, True),
    "decoupled_weight_decay": (False, True),
    "adam_w_mode": (False, True),
    "way": (None, "foreach", "fused"),
}
"""What changes the arithmetic; each optimizer is tried with those it has."""
DECLARED = {
    **{cls.__name__: cls for cls in OF_TORCH},
    **{f"{name} of ds-core": find_optimizer(name) for name in ("adam", "adamw")},
}


def options_of(factory: Any, drawn: dict[str, Any]) -> dict[str, Any]:
    known = inspect.signature(factory).parameters
    found = {key: value for key, value in drawn.items() if key in known}
    if not found.get("momentum", 1.0):
        found.pop("nesterov", None)
    way = drawn["way"]
    return {"lr": 0.05, **found, **({way: True} if way in known else {})}


@pytest.mark.parametrize("name", DECLARED)
@settings(deadline=None, max_examples=12)
@given(
    drawn=st.fixed_dictionaries({key: st.sampled_from(values) for key, values in OPTIONS.items()}),
    shape=st.lists(st.integers(1, 12), max_size=2),
    at=st.lists(st.floats(0, 1), max_size=4),
    seed=st.integers(0, 2**16),
)
def test_updating_pieces_is_updating_the_whole(name, drawn, shape, at, seed):
    numel = torch.Size(shape).numel()
    cuts = sorted(round(place * numel) for place in at)
    build = partial(DECLARED[name], **options_of(DECLARED[name], drawn))
    whole, in_pieces = updated_in_pieces(build, shape, cuts, seed=seed)
    assert is_same_update(whole, in_pieces), (whole - in_pieces).abs().max()


class Lamb(torch.optim.SGD):
    """Divides by the norm of its tensor."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and param.numel():
                    param.sub_(group["lr"] * param.grad / param.grad.norm())


@pytest.mark.parametrize("cls", [Lamb, torch.optim.Adafactor])
def test_a_wrong_declaration_is_noticed(cls):
    if cls is torch.optim.Adafactor:
        wrong = partial(cls, lr=0.05)
    else:
        wrong = partial(elementwise(type("Declared", (cls,), {})), lr=0.05)
        assert is_elementwise(wrong)
    assert not is_same_update(*updated_in_pieces(wrong, (4, 3), (5,)))


def test_all_that_ds_core_offers_by_name_is_known():
    assert all(is_elementwise(find_optimizer(name)) for name in registry.names("optimizer") if name.startswith("adam"))
    others = {cls for cls in vars(torch.optim).values() if isinstance(cls, type)} - {*OF_TORCH, *WHOLE_OF_TORCH}
    others = {cls.__name__ for cls in others if issubclass(cls, torch.optim.Optimizer)}
    assert others <= {"Optimizer", "LBFGS", "SparseAdam"}, "torch has a new one: is it element-wise?"


class OtherConstructor(torch.optim.Adam):
    """The same update."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.5)

    def __repr__(self) -> str:
        return "mine"


class OtherMoments(torch.optim.Adam):
    def _init_group(self, *args: Any) -> Any:
        return super()._init_group(*args)


class ScalesItself(torch.optim.Adam):
    def step_scaled(self, factor: float) -> None:
        raise NotImplementedError


class SaysNo(OtherConstructor):
    elementwise = False


class OfNo(SaysNo):
    pass


@elementwise
class SaysYes(Lamb):
    pass


class OverridesYes(SaysYes):
    def step(self, closure: None = None) -> None:
        raise NotImplementedError


def build_some(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups)


@pytest.mark.parametrize(
    ("made_by", "expected"),
    [
        (torch.optim.Adam, True),
        (partial(partial(torch.optim.SGD, lr=0.1), momentum=0.9), True),
        (OtherConstructor, True),
        (OtherMoments, None),
        (ScalesItself, None),
        (Lamb, None),
        (SaysNo, False),
        (OfNo, False),
        (SaysYes, True),
        (OverridesYes, None),
        (torch.optim.Muon, False),
        (torch.optim.Adafactor, False),
        (torch.optim.Optimizer, None),
        (build_some, None),
        (elementwise(lambda groups: torch.optim.Adam(groups)), True),
        (None, None),
    ],
)
def test_what_is_known(made_by, expected):
    assert known_of(made_by) is expected
    assert is_elementwise(made_by) is (expected is True)


def test_an_optimizer_is_what_its_class_is():
    params = [torch.ones(2, requires_grad=True)]
    # torch wraps the step of a class when its first optimizer is made, and leaves the wrapper in the class.
    first = type("First", (torch.optim.Rprop,), {})(params)
    assert is_elementwise(first)
    assert is_elementwise(OtherConstructor(params))
    assert not is_elementwise(Lamb(params, lr=0.1))
