"""``optimizer.type`` and ``optimizer.params``: which class, with which defaults, and what is refused."""

from __future__ import annotations

import logging

import pytest
import torch

from ds_core.errors import ConfigError, MissingPackageError, NotBuiltError, PluginError
from ds_core.optim.build import build_optimizer, check_steps_without_closure, find_optimizer


def groups() -> list[dict]:
    return [{"params": [torch.ones(2, requires_grad=True)]}]


@pytest.mark.parametrize(
    ("name", "params", "cls"),
    [
        ("Adam", {}, torch.optim.AdamW),
        ("adam", {"adam_w_mode": True}, torch.optim.AdamW),
        ("ADAM", {"adam_w_mode": False}, torch.optim.Adam),
        ("AdamW", {}, torch.optim.AdamW),
        ("SGD", {"lr": 0.1}, torch.optim.SGD),
        ("sgd", {"lr": 0.1, "momentum": 0.9}, torch.optim.SGD),
        ("Adagrad", {}, torch.optim.Adagrad),
        ("RMSprop", {}, torch.optim.RMSprop),
        ("nadam", {}, torch.optim.NAdam),
    ],
)
def test_names_lead_to_classes_in_any_case(name, params, cls):
    assert type(build_optimizer(name, params, groups())) is cls


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_defaults_are_deepspeeds(name):
    [group] = build_optimizer(name, {}, groups()).param_groups
    assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (1e-3, (0.9, 0.999), 1e-8, 0.0)


def test_lists_of_json_become_tuples():
    [group] = build_optimizer("AdamW", {"betas": [0.8, 0.9]}, groups()).param_groups
    assert group["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("name", "params", "fused"),
    [
        ("AdamW", {}, True),
        ("SGD", {"lr": 0.1}, True),
        ("SGD", {"lr": 0.1, "foreach": True}, None),
        ("SGD", {"lr": 0.1, "fused": False}, False),
        ("AdamW", {"fused": False}, False),
        ("Adagrad", {}, True),
    ],
)
def test_the_fused_kernel_is_used_unless_something_else_is_chosen(name, params, fused):
    assert build_optimizer(name, params, groups()).param_groups[0]["fused"] is fused


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_complex_parameter_is_updated(name):
    # torch's fused kernels take none: some say so when they are built, some in the first step.
    param = torch.nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
    optimizer = build_optimizer(name, {"lr": 0.5}, [{"params": [param]}])
    param.grad = torch.tensor([1 - 1j, -1 + 2j])
    before = param.detach().clone()
    optimizer.step()
    assert (param.real != before.real).all()
    assert (param.imag != before.imag).all()


def test_adam_says_that_it_is_adamw(caplog):
    with caplog.at_level(logging.INFO, "ds_core"):
        build_optimizer("Adam", {}, groups())
        build_optimizer("Adam", {"weight_decay": 0.1}, groups())
        build_optimizer("Adam", {"adam_w_mode": False, "weight_decay": 0.1}, groups())
        build_optimizer("AdamW", {}, groups())
    assert len(caplog.messages) == 2
    assert 'optimizer "Adam" is AdamW here' in caplog.messages[0]
    assert "weight_decay 0.1 acts on the weights" in caplog.messages[1]


def test_adamw_stays_adamw_and_says_so(caplog):
    with caplog.at_level(logging.WARNING, "ds_core"):
        built = build_optimizer("AdamW", {"adam_w_mode": False, "torch_adam": True}, groups())
        build_optimizer("AdamW", {"adam_w_mode": True}, groups())
    assert type(built) is torch.optim.AdamW
    [message] = caplog.messages
    assert 'stays AdamW although "adam_w_mode" is false' in message


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_what_deepspeed_takes_and_torch_does_not(name):
    build_optimizer(name, {"set_grad_none": True, "fp32_optimizer_states": False}, groups())
    with pytest.raises(ConfigError, match="set_grad_none is false"):
        build_optimizer(name, {"set_grad_none": False}, groups())


def test_an_unknown_parameter_lists_the_known_ones():
    with pytest.raises(ConfigError) as caught:
        build_optimizer("AdamW", {"lr": 0.1, "learning_rate": 1, "beta": 2}, groups())
    assert caught.value.what == "optimizer 'AdamW' has no parameter 'learning_rate', 'beta'"
    assert caught.value.where == "optimizer.params.learning_rate"
    assert "weight_decay" in caught.value.fix


@pytest.mark.parametrize(
    ("name", "params"),
    [("AdamW", {"lr": -1}), ("SGD", {"lr": "fast"}), ("Adam", {"bias_correction": False}), ("AdamW", {"betas": 3})],
)
def test_values_the_optimizer_refuses_are_told(name, params):
    with pytest.raises(ConfigError, match=f"optimizer '{name}' refuses its parameters") as caught:
        build_optimizer(name, params, groups())
    assert caught.value.where == "optimizer.params"


@pytest.mark.parametrize("name", ["Lamb", "Lion", "OneBitAdam", "Muon"])
def test_optimizers_of_other_packages_are_named(name):
    with pytest.raises(MissingPackageError, match="pip install ds-"):
        find_optimizer(name)


@pytest.mark.parametrize("name", ["MuAdam", "MuAdamW", "MuSGD"])
def test_optimizers_of_mup_are_not_built(name):
    with pytest.raises(NotBuiltError, match=f"optimizer {name} is not built yet"):
        find_optimizer(name)


def test_a_misspelt_name_gets_the_nearest():
    with pytest.raises(PluginError, match="adagrad"):
        find_optimizer("Adagard")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "Adagrad"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_parameter_of_16_bits_moves_as_one_of_32(name, dtype):
    # 70 elements: whole vectors of every CPU, and a rest. torch's fused SGD moved only the rest.
    start, gradient = torch.linspace(-2, 2, 70).to(dtype), torch.linspace(1, 3, 70).to(dtype)
    ends = []
    for of in (dtype, torch.float32):
        param = torch.nn.Parameter(start.to(of, copy=True))
        param.grad = gradient.to(of)
        build_optimizer(name, {"lr": 0.25}, [{"params": [param]}]).step()
        ends.append(param.detach().float())
    assert (ends[1] - start.float()).abs().min() > 0.2
    # One rounding of numbers up to 4, and a few inside of a step of 0.25 to 0.75.
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=4 * torch.finfo(dtype).eps)


class StepsOnMetrics(torch.optim.SGD):
    def step(self, metric, closure=None):
        raise NotImplementedError


def test_what_step_alone_cannot_drive_is_refused_by_name():
    params = [torch.ones(2, requires_grad=True)]
    for optimizer, reason in (
        (torch.optim.LBFGS(params), "LBFGS needs a closure"),
        (StepsOnMetrics(params), "the step of StepsOnMetrics needs metric"),
        (torch.optim.SparseAdam(params), "SparseAdam takes only sparse gradients"),
    ):
        with pytest.raises(ConfigError, match=reason):
            check_steps_without_closure(optimizer)
    for name in ("LBFGS", "SparseAdam"):
        with pytest.raises(ConfigError, match=name):
            build_optimizer(name, {}, groups())
    check_steps_without_closure(torch.optim.SGD(params))


def test_the_parameters_given_are_left_as_they_are():
    params = {"lr": 0.1, "betas": [0.8, 0.9]}
    build_optimizer("AdamW", params, groups())
    assert params == {"lr": 0.1, "betas": [0.8, 0.9]}
