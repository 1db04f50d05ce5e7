"""The tensors behind a parameter, where every rank has all of them (stage 0)."""

from __future__ import annotations

import gc
import io
import pickle
import weakref
from functools import partial
from typing import Any

import pytest
import torch

import ds_core
from ds_core import registry, utils
from ds_core.errors import EngineError, NotBuiltError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.fragments import PRECISIONS, check_life, check_refusals
from ds_core.testing.ranks import run_ranks

INSTALLED = [name for name in PRECISIONS if name in registry.names("precision")]


@pytest.mark.parametrize("world_size", [1, 2])
def test_on_ranks(world_size: int) -> None:
    cases = [(precision, whole) for precision in INSTALLED for whole in (False, True)]
    checks = [partial(check_life, {}, *case) for case in cases]
    if world_size == 1:
        checks += [partial(check_refusals, {}, *case) for case in cases[:2]]
    run_ranks(checks, world_size)


def start(model: torch.nn.Module | None = None, **config: Any) -> Any:
    torch.manual_seed(0)
    data = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "log_level": "error",
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        **config,
    }
    return ds_core.initialize(model=torch.nn.Linear(3, 2) if model is None else model, config=data)[0]


def test_every_name_is_where_deepspeed_has_it() -> None:
    names = {f"safe_{how}_{what}" for how in ("get", "set") for what in ("full_fp32_param", "full_grad")}
    names |= {f"safe_{how}_{what}" for how in ("get", "set") for what in ("local_fp32_param", "local_grad")}
    names |= {f"safe_{how}_{of}_optimizer_state" for how in ("get", "set") for of in ("full", "local")}
    names |= {"safe_update_full_grad_vectorized", "logger", "log_dist", "RepeatingLoader"}
    assert set(utils.__all__) == names
    assert set(dir(utils)) >= names
    assert all(callable(getattr(utils, name)) or name == "logger" for name in names)
    assert ds_core.utils is utils


def test_a_name_of_a_later_release_says_so() -> None:
    with pytest.raises(NotBuiltError, match=r"ds_core\.utils\.set_z3_leaf_modules is not built yet.* ds-zero"):
        utils.set_z3_leaf_modules  # noqa: B018
    assert not hasattr(utils, "groups")
    with pytest.raises(AttributeError, match=r"module 'ds_core\.utils' has no attribute 'safe_get'"):
        utils.safe_get  # noqa: B018


def test_parameters_are_pickled_as_before() -> None:
    engine = start()
    assert vars(engine.module.weight) == {}
    file = io.BytesIO()
    torch.save(list(engine.module.parameters()), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)[0], engine.module.weight)
    assert torch.equal(pickle.loads(pickle.dumps(engine.module)).weight, engine.module.weight)


def test_a_dropped_engine_is_not_kept() -> None:
    engine = start()
    weight = engine.module.weight
    assert utils.safe_get_full_fp32_param(weight) is not None
    gone = weakref.ref(engine)
    del engine
    gc.collect()
    assert gone() is None
    assert utils.safe_get_full_fp32_param(weight) is None


def test_of_two_engines_the_newest_counts() -> None:
    model = torch.nn.Linear(3, 2)
    first = start(model)
    second = start(model, optimizer={"type": "Adam", "params": {"lr": 0.5}})
    second.basic_optimizer.state[model.weight]["exp_avg"] = torch.ones(2, 3)
    assert utils.safe_get_full_optimizer_state(model.weight, "exp_avg").sum() == 6
    second.destroy()
    with pytest.raises(EngineError, match="keeps no tensor 'exp_avg'"):
        utils.safe_get_full_optimizer_state(model.weight, "exp_avg")
    first.destroy()
    assert utils.safe_get_full_optimizer_state(model.weight, "exp_avg") is None


def test_an_engine_that_only_runs_forward_trains_nothing() -> None:
    config = {"train_micro_batch_size_per_gpu": 2, "log_level": "error"}
    engine = ds_core.initialize(model=torch.nn.Linear(3, 2), config=config)[0]
    assert utils.safe_get_full_fp32_param(engine.module.weight) is None


class Turned(torch.nn.Module):
    """Its weight, and so its gradient, does not lie in memory row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(3, 2).t())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight)


@pytest.mark.parametrize("precision", INSTALLED)
def test_a_parameter_with_strides_of_its_own(precision: str) -> None:
    engine = start(Turned(), **PRECISIONS[precision])
    weight = engine.module.weight
    value = torch.arange(6.0).view(2, 3)
    utils.safe_set_full_fp32_param(weight, value)
    assert torch.equal(weight, value.to(weight.dtype))
    utils.safe_set_local_fp32_param(weight, value.flatten() + 1)
    assert torch.equal(weight, (value + 1).to(weight.dtype))
    assert torch.equal(utils.safe_get_full_fp32_param(weight), value + 1)
    engine.backward(engine(torch.ones(2, 3).to(weight.dtype)).float().mean())
    utils.safe_set_full_grad(weight, value)
    assert torch.equal(utils.safe_get_full_grad(weight), value)
    engine.step()
    assert torch.equal(utils.safe_get_full_fp32_param(weight), value + 1 - 0.5 * value)
