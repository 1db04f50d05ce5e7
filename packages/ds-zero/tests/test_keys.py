"""What the keys of ``zero_optimization`` do at stages 1 and 2; the root's tests walk all of them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import ds_core
from ds_core import comm
from ds_core.errors import CheckpointError, ConfigError, EngineError
from ds_core.interfaces.precision import PrecisionPlan
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.partition import check_divisions
from ds_core.testing.ranks import run_ranks
from ds_zero.partition import ZeroStage1, ZeroStage2

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "SGD", "params": {"lr": 0.1}}}


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Linear(3, 1) for _ in "abc")

    def forward(self, x: torch.Tensor, names: str) -> torch.Tensor:
        return torch.stack([getattr(self, name)(x) for name in names]).square().mean()


def start(**keys: object) -> ds_core.DeepSpeedEngine:
    return ds_core.initialize(model=Branches(), config={**CONFIG, "zero_optimization": keys})[0]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"offload_optimizer": {"device": "cpu"}}, 'offload_optimizer: device is "cpu", which is not built yet'),
        (
            {"offload_optimizer": {"device": "nvme", "nvme_path": "there"}},
            'offload_optimizer: device is "nvme", which is not built yet',
        ),
        ({"cpu_offload": True}, 'offload_optimizer: device is "cpu", which is not built yet'),
        ({"zenflow": {}}, "zenflow: a section is given, which is not built yet"),
        ({"offload_param": {"device": "cpu"}}, 'device is "cpu", which needs ZeRO stage 3'),
        ({"legacy_stage1": True}, "removed from DeepSpeed"),
    ],
)
def test_what_is_not_built_is_refused_before_there_is_a_group(stage, given, text):
    with pytest.raises(ConfigError) as caught:
        start(stage=stage, **given)
    assert text in str(caught.value)
    assert not comm.is_initialized()


def test_no_device_is_no_offload():
    engine = start(stage=2, offload_optimizer={"device": "none", "pin_memory": False})
    report = engine.report()
    assert report["zero_optimization.offload_optimizer.pin_memory"] == 'no effect: device is "none"'
    assert "zero_optimization.offload_optimizer.device" not in report


def unused_parameters() -> None:
    rank = comm.get_rank()
    for stage in (1, 2):
        engine = start(stage=stage, ignore_unused_parameters=False)
        # Each is used somewhere: nothing to tell.
        engine.backward(engine(torch.ones(2, 3), ("ab", "c")[rank]))
        engine.step()
        engine.backward(engine(torch.ones(2, 3), ("b", "a")[rank]))
        with pytest.raises(EngineError) as caught:
            engine.step()
        assert "2 parameters got no gradient on any rank in this step: 'c.weight', 'c.bias'" in str(caught.value)
        assert "call engine.zero_grad()" in caught.value.fix
        engine.zero_grad()
        twin = start(stage=stage)
        twin.module.load_state_dict(engine.module.state_dict())
        for each in (engine, twin):
            each.backward(each(torch.ones(2, 3), "abc"))
            each.step()
        assert engine.global_steps == 2
        assert all(map(torch.equal, engine.module.parameters(), twin.module.parameters())), "nothing was added"
        engine.destroy()
        twin.destroy()


def windows_of_another_division(folder: Path) -> None:
    def start_with(stage: int, **keys: object) -> ds_core.DeepSpeedEngine:
        config = {**CONFIG, **keys, "gradient_accumulation_steps": 2, "zero_optimization": {"stage": stage}}
        return ds_core.initialize(model=Branches(), config=config)[0]

    for stage in (0, 1, 2):
        engine = start_with(stage)
        engine.backward(engine(torch.ones(2, 3), "abc"))
        engine.step()
        engine.save_checkpoint(folder, tag=str(stage))
        for keys in ({"gradient_allreduce_op": "sum"}, {"gradient_predivide_factor": 8}):
            with pytest.raises(
                CheckpointError, match=r"multiplied by 0\.5 before their sum over the ranks, this job's"
            ):
                start_with(stage, **keys).load_checkpoint(folder, tag=str(stage))
        start_with(stage, prescale_gradients=True).load_checkpoint(folder, tag=str(stage))


def test_on_two_ranks(tmp_path):
    """Unused parameters are named on every rank; a window goes on only where gradients are divided alike."""
    run_ranks([unused_parameters, partial(windows_of_another_division, tmp_path)], 2)


def test_divisions_on_three_ranks():
    run_ranks([partial(check_divisions, cls, {}, PrecisionPlan()) for cls in (ZeroStage1, ZeroStage2)], 3)
