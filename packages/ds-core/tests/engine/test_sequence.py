"""Calls in an unusual order, and models that do unusual things: what happens is right, or refused by name."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.errors import CheckpointError, ConfigError, EngineError
from ds_core.testing.ranks import expect_rank_errors, run_ranks

if TYPE_CHECKING:
    from pathlib import Path

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 2,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


@pytest.fixture(autouse=True)
def leave_no_group():
    yield
    comm.destroy_process_group()


class Counting(torch.nn.Module):
    """Rebinds its buffer instead of changing it in place."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 1)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count = self.count + 1
        return self.inner(x).square().mean()


def start(model: torch.nn.Module | None = None, **config: Any):
    torch.manual_seed(0)
    return ds_core.initialize(model=model or Counting(), config={**CONFIG, **config})[0]


def micro_step(engine) -> None:
    engine.backward(engine(torch.ones(2, 3)))
    engine.step()


def test_a_buffer_that_the_model_rebinds_is_saved_and_loaded(tmp_path):
    engine = start()
    for _ in range(4):
        micro_step(engine)
    engine.save_checkpoint(tmp_path)
    other = start()
    micro_step(other)
    micro_step(other)
    other.load_checkpoint(tmp_path)
    assert other.module.count.item() == 4


def test_gradients_of_a_backward_that_raised_are_not_stepped_on_or_saved(tmp_path):
    engine = start(gradient_accumulation_steps=1)
    weight = engine.module.inner.weight.clone()
    engine.backward(engine(torch.ones(2, 3)))
    loss = engine(torch.ones(2, 3))
    loss.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.backward(loss)
    with pytest.raises(EngineError, match=r"the backward before this one raised[\s\S]*zero_grad\(\) to drop them"):
        engine.step()
    assert torch.equal(engine.module.inner.weight, weight)
    engine.zero_grad()
    micro_step(engine)
    assert engine.was_step_applied()


def test_a_checkpoint_between_backward_and_step_is_refused(tmp_path):
    engine = start()
    engine.backward(engine(torch.ones(2, 3)))
    with pytest.raises(CheckpointError, match="between a backward and its step"):
        engine.save_checkpoint(tmp_path)
    engine.step()
    engine.save_checkpoint(tmp_path, tag="inside")
    with pytest.raises(CheckpointError, match="an accumulation window of 2 micro-batches, this job's have 4"):
        start(gradient_accumulation_steps=4).load_checkpoint(tmp_path, tag="inside")


def test_a_forced_boundary_opens_a_whole_window():
    engine = start(gradient_accumulation_steps=4)
    micro_step(engine)
    engine.set_gradient_accumulation_boundary(True)
    micro_step(engine)
    assert engine.global_steps == 1
    engine.set_gradient_accumulation_boundary(None)
    for _ in range(3):
        micro_step(engine)
    assert engine.global_steps == 1
    micro_step(engine)
    assert engine.global_steps == 2


def test_files_of_the_user_stay_where_they_are(tmp_path):
    engine = start()
    engine.save_checkpoint(tmp_path, tag="a")
    (tmp_path / "a" / "model.safetensors").write_text("mine")
    (tmp_path / "a" / "rank_00000-0123456789ab.safetensors.tmp").write_text("of a torn save")
    engine.save_checkpoint(tmp_path, tag="a")
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert "model.safetensors" in names
    assert len(names) == 3


def test_a_loss_that_reaches_another_engine_is_named():
    critic, generator = start(torch.nn.Linear(3, 1)), start(torch.nn.Linear(3, 3))
    with pytest.raises(EngineError, match=r"nor is a loss of one engine that reaches[\s\S]*parameter 'bias'"):
        generator.backward(critic(generator(torch.ones(2, 3))).mean())


def test_a_wrong_shape_is_told_before_a_tensor_changes(tmp_path):
    def net(width: int) -> torch.nn.Module:
        return torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, width))

    engine = start(net(1))
    engine.save_checkpoint(tmp_path)
    torch.manual_seed(1)
    other = start(net(2))
    with torch.no_grad():
        other.module[0].weight.zero_()
    with pytest.raises(CheckpointError, match=r"weight '1\.weight' is \[1, 3\] in the checkpoint and \[2, 3\]"):
        other.load_checkpoint(tmp_path)
    assert not other.module[0].weight.any()


@pytest.mark.parametrize(
    ("section", "key"),
    [("partition", "replicated"), ("precision", "fp32"), ("checkpoint", "plain")],
)
def test_options_a_plugin_does_not_have_are_told_on_one_rank_too(section, key):
    with pytest.raises(ConfigError, match=f"{section}.{key}"):
        # Without a choice of ours the core takes what is installed for checkpoints.
        start(**{section: {key: {"bucket_bites": 5}, **({"engine": key} if section == "checkpoint" else {})}})
    assert not comm.is_initialized()


def different_configurations() -> None:
    start(gradient_accumulation_steps=1 + comm.get_rank())


def raise_with_a_collective_under_way(folder: Path) -> str:
    """Rank 1 catches the error of its backward and tries to go on; rank 0 waits until it has tried."""
    engine = start(gradient_accumulation_steps=1, partition={"replicated": {"bucket_bytes": 1}})
    engine.backward(engine(torch.ones(2, 3)))  # in the first, ranks wait for each other before anything is sent
    engine.step()
    if comm.get_rank() == 0:
        torch.distributed.distributed_c10d._get_default_store().get("tried")
        return ""
    loss = engine(torch.ones(2, 3))
    engine.module.inner.weight.register_hook(lambda gradient: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.backward(loss)
    with pytest.raises(EngineError) as caught:
        engine.zero_grad()
    torch.distributed.distributed_c10d._get_default_store().set("tried", "yes")
    return str(caught.value)


def test_a_rank_that_gave_up_on_a_collective_cannot_go_on(tmp_path):
    [[_, message]] = run_ranks([partial(raise_with_a_collective_under_way, tmp_path)], 2)
    assert "the ranks are no longer in step" in message
    assert "start the job again from its last checkpoint" in message


def test_ranks_with_different_configurations_are_told_so():
    errors = expect_rank_errors(different_configurations, 2)
    assert sorted(errors) == [0, 1]
    assert all("parameter groups or configuration differ between ranks: [1]" in text for text in errors.values())
