"""``engine.report()`` lists every key that was given and changes nothing in this engine, with the reason (P03b)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import ds_core
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here
from ds_core.testing.ranks import run_ranks

BASE: dict[str, Any] = {"train_batch_size": 4}
SGD = {"type": "SGD", "params": {"lr": 0.1}}
WARMUP = {"type": "WarmupLR", "params": {"warmup_num_steps": 4}}
NOTHING_TRAINED = "no effect: this engine has no optimizer, so it takes no steps"
ONE_RANK = "no effect: one rank has nothing to reduce"


def listed(config: dict[str, Any], **arguments: Any) -> dict[str, str]:
    """Return what the report says of keys."""
    model = arguments.pop("model", None) or torch.nn.Linear(2, 1)
    engine = ds_core.initialize(model=model, config={**BASE, **config}, **arguments)[0]
    report = engine.report()
    engine.destroy()
    assert all(isinstance(text, str) for item in report.items() for text in item)
    return {path: why for path, why in report.items() if why.startswith("no effect: ")}


def test_nothing_is_listed_where_everything_is_at_work():
    config = {"optimizer": SGD, "scheduler": WARMUP, "gradient_clipping": 0.5, "steps_per_print": 1}
    assert listed(config) == {}


def test_what_the_configuration_alone_shows():
    found = listed(
        {
            "optimizer": SGD,
            "zero_optimization": {"stage": 0, "reduce_bucket_size": 1000},
            "fp16": {"enabled": False, "loss_scale": 0},
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"engine": "plain", "sharded": {"writers": 4}},
        }
    )
    assert found == {
        "zero_optimization.reduce_bucket_size": "no effect: zero_optimization.stage is 0",
        "fp16.loss_scale": "no effect: not enabled",
        "zero_allow_untested_optimizer": "no effect: every optimizer is allowed",
        "checkpoint.sharded": 'no effect: "sharded" was not chosen; its keys are unchecked',
    }


def test_without_training_data_no_loader_drops_a_batch():
    config = {"optimizer": SGD, "dataloader_drop_last": True}
    assert list(listed(config)) == ["dataloader_drop_last"]
    assert listed(config, training_data=[torch.ones(2)] * 5) == {}


def test_an_optimizer_of_the_caller_replaces_the_section():
    net = torch.nn.Linear(2, 1)
    mine = torch.optim.SGD(net.parameters(), lr=0.1)
    why = "no effect: initialize was given optimizer="
    config = {"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}, "scheduler": WARMUP}
    assert listed(config, model=net, optimizer=mine) == {"optimizer.type": why, "optimizer.params": why}


def test_a_schedule_of_the_caller_replaces_the_section():
    def mine(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.ConstantLR(optimizer)

    why = "no effect: initialize was given lr_scheduler="
    expected = {"scheduler.type": why, "scheduler.params": why}
    assert listed({"optimizer": SGD, "scheduler": WARMUP}, lr_scheduler=mine) == expected


@pytest.mark.parametrize(
    ("scheduler", "is_read"),
    [
        (WARMUP, True),
        ({"type": "WarmupLR", "params": {"warmup_max_lr": 0.2}}, False),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": 9}}, False),
        ({"type": "WarmupDecayLR", "params": {"total_num_steps": 9, "warmup_max_lr": None}}, True),
        ({"type": "WarmupCosineLR", "params": {"total_num_steps": 9}}, True),
        ({"type": "ConstantLR"}, True),
    ],
)
def test_a_schedule_that_knows_its_rates_makes_that_of_the_optimizer_idle(scheduler, is_read):
    found = listed({"optimizer": SGD, "scheduler": scheduler})
    why = f"no effect: {scheduler['type']} sets the learning rate of every step"
    assert found == ({} if is_read else {"optimizer.params.lr": why})

    def lr(rate: float) -> list[float]:
        config = {**BASE, "optimizer": {"type": "SGD", "params": {"lr": rate}}, "scheduler": scheduler}
        engine = ds_core.initialize(model=torch.nn.Linear(2, 1), config=config)[0]
        rates = engine.get_lr()
        for _ in range(6):
            engine.backward(engine(torch.ones(4, 2)).sum())
            engine.step()
            rates += engine.get_lr()
        return rates

    assert (lr(0.1) != lr(0.3)) is is_read


def test_nothing_is_trained_without_an_optimizer(tmp_path):
    config = {
        "gradient_clipping": 0.5,
        "steps_per_print": 5,
        "data_types": {"grad_accum_dtype": "fp32", "buffer_dtype": "bf16"},
        "csv_monitor": {"enabled": True, "output_path": str(tmp_path)},
        "communication_data_type": "bf16",
    }
    paths = ("gradient_clipping", "steps_per_print", "data_types.grad_accum_dtype", "csv_monitor.enabled")
    assert listed(config) == dict.fromkeys((*paths, "communication_data_type"), NOTHING_TRAINED)


def test_an_optimizer_without_parameters_is_listed():
    why = "no effect: no parameter is trained"
    found = listed({"optimizer": SGD, "steps_per_print": 5}, model=torch.nn.Linear(2, 1).requires_grad_(False))
    assert found == {"optimizer.type": why, "optimizer.params": why, "steps_per_print": NOTHING_TRAINED}


AMONG_RANKS = {
    "optimizer": SGD,
    "communication_data_type": "bf16",
    "checkpoint": {"tag_validation": "Fail"},
    "partition": {"replicated": {"bucket_bytes": 100}},
}


def test_one_rank_reduces_nothing_and_has_one_tag():
    assert listed(AMONG_RANKS) == {
        "communication_data_type": ONE_RANK,
        "partition.replicated.bucket_bytes": ONE_RANK,
        "checkpoint.tag_validation": "no effect: one rank has one tag",
    }


def listed_among_ranks() -> dict[str, str]:
    return listed(AMONG_RANKS)


def test_several_ranks_do():
    assert run_ranks([listed_among_ranks], 2) == [[{}, {}]]


def test_deprecated_keys_that_are_read_as_nothing():
    old = {"stage": 0, "cpu_offload_use_pin_memory": True, "cpu_offload": False}
    assert listed({"optimizer": SGD, "zero_optimization": old}) == {
        f"zero_optimization.{key}": f"no effect: deprecated; {instead}"
        for key, instead in {
            "cpu_offload_use_pin_memory": 'write "pin_memory" in an offload section',
            "cpu_offload": "remove it",
        }.items()
    }
