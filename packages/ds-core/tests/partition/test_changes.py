"""What somebody does to the model of a living engine: every rank says so, by name, and goes on where it was undone."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.partition.changes import ModelWatch
from ds_core.testing.ranks import run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable


def model() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    net.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    net.outside = nn.Parameter(torch.ones(2))
    return net


def watch(net: nn.Module, *, keeps_data: bool = True) -> ModelWatch:
    names = {param: name for name, param in net.named_parameters()}
    params = [param for name, param in net.named_parameters() if name not in ("frozen", "outside")]
    return ModelWatch(net, params, names, keeps_data=keeps_data)


def freeze(net: nn.Module) -> None:
    net[0].bias.requires_grad_(False)


def unfreeze(net: nn.Module) -> None:
    net.frozen.requires_grad_(True)


def add_parameter(net: nn.Module) -> None:
    net[2].register_parameter("extra", nn.Parameter(torch.ones(1)))


def add_module(net: nn.Module) -> None:
    net[0].add_module("late", nn.Linear(1, 1))


def replace_module(net: nn.Module) -> None:
    net[2] = nn.Linear(4, 1)


def replace_data(net: nn.Module) -> None:
    net[2].weight.data = net[2].weight.data.clone()


def cast(net: nn.Module) -> None:
    net.double()


CHANGES: dict[str, tuple[Callable[[nn.Module], None], str, str]] = {
    "freeze": (freeze, "a parameter that is trained was frozen after initialize", "0.bias"),
    "unfreeze": (unfreeze, "a frozen parameter requires grad since initialize", "frozen"),
    "add_parameter": (add_parameter, "a parameter was added to the model after initialize", "2.extra"),
    "add_module": (add_module, "a parameter was added to the model after initialize", "0.late.weight"),
    "replace_module": (replace_module, "a parameter was added to the model after initialize", "2.weight"),
    "replace_data": (replace_data, "a parameter was given other memory after initialize", "2.weight"),
    "cast": (cast, "[4, 3] torch.float64 on cpu instead of [4, 3] torch.float32 on cpu", "0.weight"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_found_and_named(name):
    change, what, parameter = CHANGES[name]
    net = model()
    found = watch(net)
    assert found.change() is None
    change(net)
    assert what in found.change().error().what
    assert found.change().error().where == f"parameter {parameter!r}"
    assert "initialize" in found.change().error().fix


def test_what_may_be_done_is_no_change():
    net = model()
    found = watch(net)
    net.outside.requires_grad_(False)
    net.outside.requires_grad_(True)
    net.add_module("cache", nn.Identity())
    net.register_parameter("constant", nn.Parameter(torch.ones(1), requires_grad=False))
    net.register_parameter("nothing", nn.Parameter(torch.ones(0)))
    net.register_buffer("count", torch.zeros(1))
    net[0], net[2] = net[2], net[0]
    with torch.no_grad():
        net[0].weight.add_(1)
    net.train()
    net.to("cpu")
    assert found.change() is None
    freeze(net)
    net[2].weight.requires_grad_(False)
    assert found.change() is not None


def test_an_added_parameter_is_found_behind_what_was_added_before():
    net = model()
    found = watch(net)
    net.add_module("cache", nn.Sequential())
    assert found.change() is None
    net.cache.append(nn.Linear(1, 1))
    assert found.change().name == "cache.0.weight"


def test_data_may_move_where_nothing_depends_on_its_place():
    net = model()
    found = watch(net, keeps_data=False)
    replace_data(net)
    assert found.change() is None
    cast(net)
    assert found.change().name == "0.weight"


def test_an_empty_parameter_is_neither_frozen_nor_trained():
    net = nn.ParameterList([nn.Parameter(torch.ones(0, 4)), nn.Parameter(torch.ones(1))])
    names = {param: name for name, param in net.named_parameters()}
    found = ModelWatch(net, list(names), names, keeps_data=True)
    net[0].requires_grad_(False)
    assert found.change() is None


def changed_and_undone(name: str, ranks: tuple[int, ...]) -> dict[str, Any]:
    """Train two steps, change the model on ``ranks``, undo it, and train one more step."""
    net = model()
    trained = [param for key, param in net.named_parameters() if key not in ("frozen", "outside")]
    config = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}
    engine = ds_core.initialize(model=net, model_parameters=trained, config=config)[0]

    def step() -> str:
        try:
            engine.backward(engine(torch.full((2, 3), 1.0 + comm.get_rank())).square().mean())
            engine.step()
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    errors = [step(), step()]
    requires_grad = {param: param.requires_grad for param in net.parameters()}
    if comm.get_rank() in ranks:
        CHANGES[name][0](net)
        errors.append(step())
        for param, did in requires_grad.items():
            param.requires_grad_(did)
        net.frozen.grad = None
    elif name:
        errors.append(step())
    engine.zero_grad()
    errors.append(step())
    return {"errors": errors, "weights": [param.detach().clone() for param in trained]}


def test_every_rank_raises_and_goes_on_where_it_was_undone():
    cases = [(name, ranks) for name in ("freeze", "unfreeze") for ranks in ((0, 1), (1,))]
    functions = [partial(changed_and_undone, *case) for case in [("", ()), *cases]]
    plain, *results = run_ranks(functions, 2)
    for (name, ranks), of_ranks in zip(cases, results, strict=True):
        for rank, (found, expected) in enumerate(zip(of_ranks, plain, strict=True)):
            assert expected["errors"] == [""] * 3
            first, second, error, last = found["errors"]
            assert (first, second, last) == ("", "", "")
            text = CHANGES[name][1] if rank in ranks else "another rank changed its model after initialize"
            assert error.startswith(f"EngineError: {text}")
            for weight, of_plain in zip(found["weights"], expected["weights"], strict=True):
                assert torch.equal(weight, of_plain)
