"""Arguments of optimizers and schedules: they agree with what is built, and are checked as strictly."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from pydantic_core import PydanticUndefined

from ds_core.config import Section, find_problems
from ds_core.config.problems import validate
from ds_core.config.section import NoEffect
from ds_core.config.sections.arguments import ARGUMENTS, argument_problems, arguments_of
from ds_core.errors import ConfigError
from ds_core.optim.adam import adam, adamw
from ds_core.optim.build import build_optimizer
from ds_core.schedules import WarmupCosineLR, WarmupDecayLR, WarmupLR, build_schedule
from ds_core.testing.config import SectionContract

REQUIRED: dict[str, dict[str, Any]] = {
    "WarmupDecayLR": {"total_num_steps": 10},
    "WarmupCosineLR": {"total_num_steps": 10},
    "OneCycle": {"cycle_min_lr": 0.1, "cycle_max_lr": 1},
}


class TestContract(SectionContract):
    @pytest.fixture(params=[(section, name) for section in ARGUMENTS for name in ARGUMENTS[section]], ids="-".join)
    def key(self, request: pytest.FixtureRequest) -> tuple[str, str]:
        return request.param

    @pytest.fixture
    def section_class(self, key: tuple[str, str]) -> type[Section]:
        return ARGUMENTS[key[0]][key[1]]

    @pytest.fixture
    def valid(self, key: tuple[str, str]) -> dict[str, Any]:
        return REQUIRED.get(key[1], {})

    def test_its_schema_has_every_key(self, section_class: type[Section]) -> None:
        schema = section_class.model_json_schema(by_alias=True)
        assert schema["properties"].keys() == section_class.model_fields.keys()
        assert all({"type", "enum", "anyOf"} & one.keys() for one in schema["properties"].values())

    def test_it_says_where_its_facts_stand(self, section_class: type[Section]) -> None:
        assert section_class.source.startswith("spec/core.md ")
        assert section_class.__doc__


def taken_by(factory: Any, *, besides: str) -> dict[str, Any]:
    """Return the arguments of ``factory`` and their defaults."""
    return {
        name: PydanticUndefined if parameter.default is parameter.empty else parameter.default
        for name, parameter in inspect.signature(factory).parameters.items()
        if name != besides
    }


def written_in(section: type[Section]) -> dict[str, Any]:
    return {name: field.default for name, field in section.model_fields.items()}


@pytest.mark.parametrize(("name", "factory"), [("Adam", adam), ("AdamW", adamw)])
def test_our_optimizers_take_what_is_written_here(name: str, factory: Any) -> None:
    assert written_in(ARGUMENTS["optimizer"][name]) == taken_by(factory, besides="param_groups")


@pytest.mark.parametrize("schedule", [WarmupLR, WarmupDecayLR, WarmupCosineLR])
def test_our_schedules_take_what_is_written_here(schedule: type) -> None:
    assert written_in(ARGUMENTS["scheduler"][schedule.__name__]) == taken_by(schedule, besides="optimizer")


@pytest.mark.parametrize(
    ("name", "factory", "others"),
    [
        ("Adagrad", torch.optim.Adagrad, {"amsgrad", "fp32_optimizer_states"}),
        ("MuAdam", torch.optim.Adam, {"decoupled_wd"}),
        ("MuAdamW", torch.optim.AdamW, {"decoupled_wd"}),
        ("MuSGD", torch.optim.SGD, {"decoupled_wd"}),
    ],
)
def test_torchs_optimizers_take_what_is_written_here(name: str, factory: Any, others: set[str]) -> None:
    taken = taken_by(factory, besides="params")
    written = written_in(ARGUMENTS["optimizer"][name])
    assert {key: value for key, value in written.items() if key not in others} == {
        key: taken[key] for key in written if key not in others
    }
    assert others.isdisjoint(taken)


def groups() -> list[dict[str, Any]]:
    return [{"params": [torch.nn.Parameter(torch.zeros(2))]}]


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_the_defaults_of_deepspeed_build(name: str) -> None:
    defaults = ARGUMENTS["optimizer"][name]().model_dump()
    assert isinstance(build_optimizer(name, defaults, groups()), torch.optim.AdamW)


@pytest.mark.parametrize("name", ["WarmupLR", "WarmupDecayLR", "WarmupCosineLR"])
def test_the_schedules_defaults_build(name: str) -> None:
    needed = {} if name == "WarmupLR" else {"total_num_steps": 2000}
    values = ARGUMENTS["scheduler"][name].model_validate(needed)
    sgd = torch.optim.SGD(groups(), lr=1.0)
    assert build_schedule(name, values.model_dump(), sgd).get_last_lr() == [0.0]


BAD_FOR_SCHEDULES = [
    {"warmup_num_steps": 4.0},
    {"warmup_num_steps": "4"},
    {"warmup_num_steps": 0},
    {"warmup_num_steps": True},
    {"warmup_type": "lin"},
    {"warmup_min_lr": "0.1"},
    {"warmup_min_lr": [0.1, "x"]},
    {"warmup_min_lr": True},
    {"warmup_min_lr": float("inf")},
    {"warmup_max": 1},
]


@pytest.mark.parametrize("params", BAD_FOR_SCHEDULES)
def test_what_the_schedule_refuses_is_refused_here(params: dict[str, Any]) -> None:
    (problem,) = argument_problems("scheduler", "WarmupLR", params)
    assert problem.path == f"scheduler.params.{next(iter(params))}"
    with pytest.raises(ConfigError):
        build_schedule("WarmupLR", params, torch.optim.SGD(groups(), lr=1.0))


@pytest.mark.parametrize(
    "params",
    [
        {"warmup_min_lr": [0.1]},
        {"warmup_min_lr": 0},
        {"warmup_max_lr": None},
        {"warmup_max_lr": (1.0,)},
        {"warmup_num_steps": 1},
        {"last_batch_iteration": 3},
    ],
)
def test_what_the_schedule_takes_is_taken_here(params: dict[str, Any]) -> None:
    assert argument_problems("scheduler", "WarmupLR", params) == []
    build_schedule("WarmupLR", params, torch.optim.SGD(groups(), lr=1.0))


BAD_FOR_ADAM = [
    ({"lr": "1e-3"}, 'got "1e-3", must be a finite number, not in quotes'),
    ({"lr": -1}, "got -1, must be at least 0"),
    ({"lr": None}, "got null, must be a finite number"),
    ({"lr": True}, "got true, must be a finite number"),
    ({"lr": float("nan")}, "got nan, must be a finite number"),
    ({"lr": 10**400}, None),
    ({"betas": [0.9]}, "got [0.9], must be a list of two numbers from 0 to below 1"),
    ({"betas": [0.9, 1]}, "got [0.9, 1], must be a list of two numbers from 0 to below 1"),
    ({"betas": 0.9}, "got 0.9, must be a list of two numbers from 0 to below 1"),
    ({"betas": ["0.9", 0.99]}, None),
    ({"adam_w_mode": "false"}, 'got "false", must be true or false, not in quotes'),
    ({"torch_adam": 3}, "got 3, must be true or false"),
    (
        {"set_grad_none": False},
        "got false, which is not built yet: gradients become None after a step; only true is accepted",
    ),
]


@pytest.mark.parametrize(("params", "text"), BAD_FOR_ADAM)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_bad_value(name: str, params: dict[str, Any], text: str | None) -> None:
    (problem,) = argument_problems("optimizer", name, params)
    assert problem.path == f"optimizer.params.{next(iter(params))}"
    assert text is None or problem.text == text


@pytest.mark.parametrize(
    ("section", "name", "key", "value", "allowed"),
    [
        ("optimizer", "muon", "ns_method", "grams", '"gram" or "standard"'),
        ("optimizer", "OneBitAdam", "comm_backend_name", "gloo", '"nccl", "mpi", "hccl" or "compressed"'),
        ("scheduler", "WarmupLR", "warmup_type", "lin", '"log" or "linear"'),
    ],
)
def test_words(section: str, name: str, key: str, value: str, allowed: str) -> None:
    (problem,) = argument_problems(section, name, {key: value})
    assert problem.text == f'got "{value}", allowed are {allowed}'


@pytest.mark.parametrize(
    ("name", "key"),
    [("muon", "momentum"), ("onebitlamb", "coeff_beta")],
)
def test_shares(name: str, key: str) -> None:
    (problem,) = argument_problems("optimizer", name, {key: 1.5})
    assert problem.text == "got 1.5, allowed are 0 to 1"
    assert argument_problems("optimizer", name, {key: 1}) == []


@pytest.mark.parametrize("name", ["lamb", "onebitlamb", "onebitadam", "zerooneadam", "adagrad"])
def test_no_amsgrad(name: str) -> None:
    (problem,) = argument_problems("optimizer", name, {"amsgrad": True})
    assert "only false is accepted" in problem.text


def test_numbers_of_other_libraries() -> None:
    import numpy

    params = {"lr": numpy.float32(0.5), "eps": torch.tensor(0.5), "betas": (0.0, numpy.float64(0.5))}
    assert argument_problems("optimizer", "Adam", params) == []
    assert [one.path for one in argument_problems("optimizer", "Adam", {"lr": torch.ones(2)})] == [
        "optimizer.params.lr"
    ]


@pytest.mark.parametrize(
    ("section", "name", "params", "path", "fix"),
    [
        ("optimizer", "AdamW", {"weight_decy": 1}, "weight_decy", 'did you mean "weight_decay"?'),
        ("optimizer", "LION", {"beta": 1}, "beta", 'did you mean "betas"?'),
        ("scheduler", "WarmupLR", {"warmup_steps": 1}, "warmup_steps", 'did you mean "warmup_num_steps"?'),
        ("scheduler", "OneCycle", REQUIRED["OneCycle"] | {"lr": 1}, "lr", 'it belongs under "optimizer.params"'),
    ],
)
def test_an_unknown_key(section: str, name: str, params: dict[str, Any], path: str, fix: str) -> None:
    (problem,) = argument_problems(section, name, params)
    assert (problem.path, problem.fix) == (f"{section}.params.{path}", fix)


def test_a_key_of_another_optimizer_does_not_belong_where_it_is() -> None:
    (problem,) = argument_problems("optimizer", "AdamW", {"momentum": 0.9})
    assert problem.path == "optimizer.params.momentum"
    assert "belongs" not in (problem.fix or "")


def test_auto_is_left_to_whoever_needs_the_value() -> None:
    assert argument_problems("optimizer", "AdamW", {"lr": "auto", "betas": "auto"}) == []
    assert argument_problems("optimizer", "AdamW", {"betas": [0.9, "auto"]}) == []
    assert argument_problems("scheduler", "WarmupDecayLR", {"total_num_steps": "auto"}) == []
    (problem,) = argument_problems("scheduler", "WarmupDecayLR", {"warmup_num_steps": "auto"})
    assert (problem.path, problem.text) == ("scheduler.params.total_num_steps", "is missing")


def test_max_grad_norm_has_a_message_of_its_own() -> None:
    assert argument_problems("optimizer", "AdamW", {"max_grad_norm": 1.0}) == []
    (problem,) = find_problems({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1.0}}})
    assert problem.fix == 'write it as "gradient_clipping" at the top level'


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("AdamW", {"lr": 3e-5, "torch_adam": True, "adam_w_mode": True}),
        ("Adam", {"lr": 3e-5, "weight_decay": 0.0, "bias_correction": False}),
        ("Muon", {"lr": 0.1, "muon_lr": 0.02, "adam_lr": 3e-4, "momentum": 0.95, "ns_steps": 5, "betas": [0.9, 0.95]}),
    ],
)
def test_what_clients_write(name: str, params: dict[str, Any]) -> None:
    assert argument_problems("optimizer", name, params) == []


@pytest.mark.parametrize(
    ("section", "name"), [("optimizer", "SGD"), ("scheduler", "StepLR"), ("optimizer", "OneCycle")]
)
def test_types_that_are_not_deepspeeds(section: str, name: str) -> None:
    assert arguments_of(section, name) is None
    assert argument_problems(section, name, {"any": "thing"}) == []


def test_arguments_that_change_nothing_say_why() -> None:
    marked = {
        name
        for name, field in ARGUMENTS["optimizer"]["Adam"].model_fields.items()
        if any(isinstance(mark, NoEffect) and mark.why for mark in field.metadata)
    }
    assert marked >= {"torch_adam", "fp32_optimizer_states"}
    assert marked <= {"torch_adam", "fp32_optimizer_states", "adam_w_mode"}


def test_values_are_those_of_the_caller() -> None:
    section, problems = validate(ARGUMENTS["scheduler"]["WarmupLR"], {"warmup_min_lr": [0, 1]})
    assert problems == []
    assert section is not None
    assert section.warmup_min_lr == (0.0, 1.0)
