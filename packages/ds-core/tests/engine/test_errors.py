"""Bad input: one clear error on every rank, never a hang."""

from __future__ import annotations

import os
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

import ds_core
from ds_core import comm, registry
from ds_core.errors import (
    CheckpointError,
    ConfigError,
    DsError,
    EngineError,
    MissingPackageError,
    NotBuiltError,
    PluginError,
)
from ds_core.testing.ranks import expect_rank_errors, run_ranks

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = {"train_micro_batch_size_per_gpu": 2, "optimizer": {"type": "AdamW", "params": {"lr": 0.01}}}


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def start(**arguments):
    return ds_core.initialize(**{"model": model(), "config": CONFIG, **arguments})[0]


def loss_of(engine) -> torch.Tensor:
    return engine(torch.ones(2, 3)).pow(2).mean()


BAD_ARGUMENTS = {
    "no model": ({"model": None}, ConfigError, "no model was given"),
    "not a model": ({"model": [1]}, ConfigError, "model is a list, not a torch.nn.Module"),
    "no config": ({"config": None}, ConfigError, "no configuration was given"),
    "missing file": ({"config": "no/such/file.json"}, ConfigError, "file not found"),
    "batch sizes": (
        {"config": {**CONFIG, "train_batch_size": 7}},
        ConfigError,
        "train_batch_size",
    ),
    "unknown optimizer": (
        {"config": {**CONFIG, "optimizer": {"type": "AdmaW"}}},
        PluginError,
        "did you mean 'adamw'",
    ),
    "unknown optimizer parameter": (
        {"config": {**CONFIG, "optimizer": {"type": "SGD", "params": {"learning_rate": 1}}}},
        ConfigError,
        "no parameter 'learning_rate'",
    ),
    "clipping in the optimizer": (
        {"config": {**CONFIG, "optimizer": {"type": "SGD", "params": {"max_grad_norm": 0.5}}}},
        ConfigError,
        'write it as "gradient_clipping" at the top level',
    ),
    "an optimizer that needs a closure": (
        {"config": {**CONFIG, "optimizer": {"type": "LBFGS"}}},
        ConfigError,
        "LBFGS needs a closure",
    ),
    "a package that is not installed": (
        {"config": {**CONFIG, "fp16": {"enabled": True}}},
        MissingPackageError,
        '"fp16.enabled" needs ds-fp16: pip install ds-fp16',
    ),
    "a stage that is not installed": (
        {"config": {**CONFIG, "zero_optimization": {"stage": 2}}},
        MissingPackageError,
        '"zero_optimization.stage 2" needs ds-zero: pip install ds-zero',
    ),
    "a schedule without an optimizer": (
        {"config": {"train_batch_size": 2, "scheduler": {"type": "WarmupLR", "params": {}}}},
        ConfigError,
        "there is no optimizer it could drive",
    ),
    "an unknown schedule": (
        {"config": {**CONFIG, "scheduler": {"type": "WarmupRL", "params": {}}}},
        ConfigError,
        "WarmupLR",
    ),
    "mpu": ({"mpu": object()}, NotBuiltError, "not built yet"),
    "mesh_param": ({"mesh_param": (1, 1)}, NotBuiltError, "not built yet"),
    "caller-owned accumulation": (
        {"config": {**CONFIG, "managed_gradient_accumulation": False}},
        ConfigError,
        "managed_gradient_accumulation",
    ),
    "two configurations": (
        {"args": type("Args", (), {"deepspeed_config": "a.json"})()},
        ConfigError,
        "two configurations were given",
    ),
    "parameters of another model": (
        {"model_parameters": list(torch.nn.Linear(2, 2).parameters())},
        ConfigError,
        "2 parameters to train are not parameters of the model",
    ),
    "not parameters": ({"model_parameters": [torch.ones(1)]}, ConfigError, "holds a Tensor"),
}


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_bad_arguments_are_told_before_a_process_group_is_touched(name, monkeypatch):
    arguments, kind, text = BAD_ARGUMENTS[name]
    # As where nothing but ds-core is installed.
    installed = registry.installed
    own = {seam: tuple(found for found in installed(seam) if found.package == "ds-core") for seam in registry.SEAMS}
    monkeypatch.setattr(registry, "installed", own.__getitem__)
    with pytest.raises(kind) as caught:
        start(**arguments)
    assert isinstance(caught.value, DsError)
    assert text in str(caught.value)
    if "optimizer parameter" not in name and "in the optimizer" not in name and "closure" not in name:
        assert name in ("an unknown schedule", "a schedule without an optimizer") or not comm.is_initialized()


@pytest.fixture(autouse=True)
def leave_no_group():
    yield
    comm.destroy_process_group()


def test_a_parameter_in_two_groups_is_refused():
    net = model()
    weight = net[0].weight
    with pytest.raises(ConfigError, match="a parameter is in the parameter groups twice"):
        start(model=net, model_parameters=[{"params": [weight]}, {"params": [weight], "lr": 0.1}])


def test_a_schedule_of_another_optimizer_is_refused():
    net = model()
    mine, other = (torch.optim.SGD(net.parameters(), lr=0.1) for _ in range(2))
    with pytest.raises(ConfigError, match="drives another optimizer"):
        start(model=net, optimizer=mine, lr_scheduler=torch.optim.lr_scheduler.StepLR(other, 1))


def test_wrong_order_and_wrong_losses_are_named():
    engine = start()
    with pytest.raises(EngineError, match=r"step\(\) without a backward"):
        engine.step()
    with pytest.raises(EngineError, match=r"shape \[2, 1\], not one element"):
        engine.backward(engine(torch.ones(2, 3)))
    with pytest.raises(EngineError, match="the loss is a float"):
        engine.backward(1.0)
    with torch.no_grad(), pytest.raises(EngineError, match="does not depend on anything"):
        engine.backward(loss_of(engine))
    with pytest.raises(EngineError, match=r"loss\.backward\(\) called directly is not built yet"):
        loss_of(engine).backward()
    with pytest.raises(NotBuiltError, match=r"engine\.no_sync is not built yet"):
        engine.no_sync()
    assert not hasattr(engine, "no_sync")
    engine.zero_grad()
    engine.backward(loss_of(engine))
    engine.step()
    assert engine.global_steps == 1


class Breaks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        raise ValueError("broken on purpose")


def test_after_a_backward_that_raised_the_window_must_start_anew():
    engine = start()
    with pytest.raises(ValueError, match="broken on purpose"):
        engine.backward(engine(Breaks.apply(torch.ones(2, 3, requires_grad=True))).mean())
    with pytest.raises(EngineError, match="the backward before this one raised"):
        engine.backward(loss_of(engine))
    engine.zero_grad()
    engine.backward(loss_of(engine))
    engine.step()
    assert engine.global_steps == 1


def test_an_engine_without_optimizer_runs_forward_only():
    engine = start(config={"train_batch_size": 2})
    assert loss_of(engine).item() > 0
    with pytest.raises(EngineError, match="this engine has no optimizer"):
        engine.backward(loss_of(engine))
    with pytest.raises(EngineError, match="this engine has no optimizer"):
        engine.step()


def test_an_engine_without_optimizer_loads_weights(tmp_path):
    trained = start()
    trained.backward(loss_of(trained))
    trained.step()
    trained.save_checkpoint(tmp_path)
    engine = start(config={"train_batch_size": 2})
    engine.load_checkpoint(tmp_path, load_module_only=True)
    assert torch.equal(engine.module[0].weight, trained.module[0].weight)
    engine.save_checkpoint(tmp_path, tag="weights")
    again = start()
    again.load_checkpoint(tmp_path, tag="weights")
    assert torch.equal(again.module[0].weight, trained.module[0].weight)


def test_a_destroyed_engine_says_so_and_leaves_the_model_usable():
    engine = start()
    net = engine.module
    engine.destroy()
    engine.destroy()
    with pytest.raises(EngineError, match="this engine was destroyed"):
        engine.step()
    with pytest.raises(EngineError, match="this engine was destroyed"):
        engine.save_checkpoint("anywhere")
    net(torch.ones(2, 3)).sum().backward()
    assert net[0].weight.grad is not None


def raise_in_the_middle(folder: Path, before_backward: bool) -> None:
    """Train, rank 1 fails in the third step; every rank does what an uncaught exception does: its process ends."""
    rank = comm.get_rank()
    try:
        engine = start()
        for step in range(4):
            loss = loss_of(engine)
            if step == 2 and rank == 1:
                if before_backward:
                    raise RuntimeError("this rank fails")
                loss = engine(Breaks.apply(torch.ones(2, 3, requires_grad=True))).mean()
            engine.backward(loss)
            engine.step()
    except Exception as error:
        (folder / f"rank{rank}").write_text(f"{type(error).__name__}: {error}")
        os._exit(7)


@pytest.mark.parametrize("before_backward", [True, False])
@pytest.mark.parametrize("world_size", [2, 3])
def test_a_rank_that_raises_in_the_middle_ends_all(world_size, before_backward, tmp_path):
    ends = expect_rank_errors(partial(raise_in_the_middle, tmp_path, before_backward), world_size, timeout_s=30)
    assert ends == dict.fromkeys(range(world_size), "ExitCode: 7")
    errors = [(tmp_path / f"rank{rank}").read_text() for rank in range(world_size)]
    assert ("this rank fails" if before_backward else "broken on purpose") in errors[1]
    for error in (*errors[:1], *errors[2:]):
        assert error.startswith("CommError: the gradients could not be summed over the ranks")
        assert "another rank has ended" in error


def different_models() -> None:
    torch.manual_seed(0)
    start(model=torch.nn.Linear(3, 1 + comm.get_rank()))


def test_ranks_with_different_models_are_told_so():
    errors = expect_rank_errors(different_models, 2)
    assert sorted(errors) == [0, 1]
    assert all("model, parameter groups or configuration differ between ranks: [1]" in text for text in errors.values())


def values_after_initialize() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(comm.get_rank())
    net = torch.nn.BatchNorm1d(3)
    torch.nn.init.normal_(net.weight)
    net.running_mean.normal_()
    engine = start(model=net)
    return engine.module.weight.detach(), engine.module.running_mean


def test_every_rank_starts_with_rank_0s_weights_and_buffers():
    [[first, second]] = run_ranks([values_after_initialize], 2)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(first, second, strict=True))


def save_badly(folder: Path, mistake: str) -> None:
    engine = start(config={**CONFIG, "checkpoint": {"tag_validation": "Fail"}})
    rank = comm.get_rank()
    if mistake == "value":
        engine.save_checkpoint(folder, client_state={"run": {"callback": print}} if rank == 1 else {})
    elif mistake == "tag":
        engine.save_checkpoint(folder, tag=f"rank{rank}")
    elif mistake == "folder":
        engine.save_checkpoint(folder / str(rank))
    elif mistake == "file":
        engine.save_checkpoint(folder / "file" / "inside")
    elif mistake == "name":
        engine.save_checkpoint(folder, tag="../elsewhere")


@pytest.mark.parametrize(
    ("mistake", "text"),
    [
        ("value", "a value of type builtin_function_or_method cannot be stored"),
        ("tag", "ranks save under different tags: rank 1 under 'rank1'"),
        ("folder", "ranks save to different folders"),
        ("file", "the folder cannot be made: Not a directory"),
        ("name", "tag '../elsewhere' cannot name a checkpoint"),
    ],
)
def test_a_save_that_fails_on_one_rank_fails_on_all_with_its_reason(mistake, text, tmp_path):
    (tmp_path / "file").write_text("")
    errors = expect_rank_errors(partial(save_badly, tmp_path, mistake), 2)
    assert sorted(errors) == [0, 1]
    assert all(text in error for error in errors.values())
    if mistake == "value":
        assert "client_state.run.callback" in errors[0]
        assert "rank 1 failed" in errors[0]


def save_good(folder: Path) -> None:
    engine = start()
    for _ in range(2):
        engine.backward(loss_of(engine))
        engine.step()
        engine.save_checkpoint(folder)


def load_bad(folder: Path, tag: str | None) -> None:
    start().load_checkpoint(folder, tag=tag)


def load_other_model(folder: Path) -> None:
    start(model=torch.nn.Linear(3, 1)).load_checkpoint(folder)


def test_loading_what_is_not_there_is_told_on_every_rank(tmp_path):
    run_ranks([partial(save_good, tmp_path / "good")], 2)
    good = tmp_path / "good"
    (good / "half").mkdir()
    cases = [
        (good, "global_step9", "there is no checkpoint 'global_step9'"),
        (good, "half", "checkpoint 'half' is not complete: it has no checkpoint.json"),
        (good, "latest", "tag 'latest' cannot name a checkpoint"),
    ]
    for folder, tag, text in cases[:2]:
        errors = expect_rank_errors(partial(load_bad, folder, tag), 2)
        assert sorted(errors) == [0, 1]
        assert all(text in error for error in errors.values())
        assert all("complete checkpoints there: global_step1, global_step2" in error for error in errors.values())
    engine = start()
    for folder, tag, text in cases:
        with pytest.raises(CheckpointError, match=text.replace(".", r"\.")):
            engine.load_checkpoint(folder, tag=tag)
    manifest_files = sorted((good / "global_step2").glob("*.safetensors"))
    whole = manifest_files[0].read_bytes()
    manifest_files[0].write_bytes(whole[:-5])
    with pytest.raises(CheckpointError, match=r"bytes instead of[\s\S]*load another one, such as tag='global_step1'"):
        engine.load_checkpoint(good)
    manifest_files[0].unlink()
    with pytest.raises(CheckpointError, match="a file of the checkpoint is missing"):
        engine.load_checkpoint(good)
    engine.load_checkpoint(good, tag="global_step1")
    assert engine.global_steps == 1
    other = start(model=torch.nn.Linear(3, 1))
    before = other.module.weight.clone()
    with pytest.raises(CheckpointError, match="model and checkpoint differ: only in the model"):
        other.load_checkpoint(good, tag="global_step1")
    with pytest.raises(CheckpointError, match="model and checkpoint differ: only in the model"):
        other.load_checkpoint(good, tag="global_step1", load_optimizer_states=False)
    assert torch.equal(before, other.module.weight)


def test_a_metric_schedule_says_how_to_give_the_metric():
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    engine = start(model=net, optimizer=optimizer, lr_scheduler=plateau)
    engine.backward(loss_of(engine))
    with pytest.raises(EngineError, match=r'lr_kwargs=\{"metrics": loss\}'):
        engine.step()
    engine.backward(loss_of(engine))
    engine.step(lr_kwargs={"metrics": 1.0})
    assert engine.get_lr() == [0.1]
