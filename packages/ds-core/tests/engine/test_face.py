"""DeepSpeed's accessor surface: every public name, on an engine of one rank."""

from __future__ import annotations

import inspect
import logging
from typing import Any

import pytest
import torch

import ds_core
from ds_core import comm
from ds_core.engine.face import EngineFace
from ds_core.errors import ConfigError, EngineError, NotBuiltError
from ds_core.testing.fixtures import one_process  # noqa: F401 - in use by being here

CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 3,
    "gradient_clipping": 0.5,
    "steps_per_print": 7,
    "log_level": "error",
    "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_min_lr": 0.001, "warmup_max_lr": 0.01}},
}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = torch.nn.Linear(3, 1)
        self.frozen = torch.nn.Linear(3, 3).requires_grad_(False)
        self.drop = torch.nn.Dropout(0.5)
        self.answer = 42
        self.register_buffer("count", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.frozen(x)).square().mean()

    def greet(self) -> str:
        return "hello"


def start(**changes: Any):
    arguments = {"model": Model(), "config": {**CONFIG, **changes.pop("config", {})}, **changes}
    return ds_core.initialize(**arguments)[0]


def micro_step(engine) -> None:
    engine.backward(engine(torch.ones(2, 3)))
    engine.step()


def test_the_public_names_are_these():
    """Those of the configuration are in test_config_getters.py."""
    own = {name for name in vars(EngineFace) if not name.startswith("_")}
    assert own == {
        *("optimizer", "basic_optimizer", "lr_scheduler", "config"),
        *("client_optimizer", "client_lr_scheduler"),
        *("global_steps", "global_samples", "skipped_steps", "micro_steps"),
        *("global_rank", "local_rank", "world_size", "data_parallel_group", "dp_world_size"),
        *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "get_batch_info"),
        *("set_train_batch_size", "is_gradient_accumulation_boundary", "set_gradient_accumulation_boundary"),
        *("get_global_grad_norm", "was_step_applied", "get_lr", "get_mom", "cur_scale"),
        *("overflows", "precision_report"),
        "report",
        *("module_state_dict", "load_module_state_dict", "zero_grad", "compile", "is_compiled", "train"),
        *("deepspeed_io", "save_checkpoint", "load_checkpoint", "checkpoint_engine", "destroy"),
        *("export_weights", "save_16bit_model", "save_fp16_model"),
    }


def test_the_clients_objects():
    engine = start()
    assert isinstance(engine.optimizer, torch.optim.AdamW)
    assert engine.basic_optimizer is engine.optimizer
    assert engine.optimizer_name() == "AdamW"
    assert engine.config == {**CONFIG}
    assert engine.get_lr() == [group["lr"] for group in engine.optimizer.param_groups]
    assert engine.get_mom() == [(0.9, 0.999)]
    schedule = engine.lr_scheduler
    engine.lr_scheduler = None
    assert engine.lr_scheduler is None
    before = engine.get_lr()
    for _ in range(3):
        micro_step(engine)
    assert engine.get_lr() == before, "nobody steps it now"
    engine.lr_scheduler = schedule
    for _ in range(6):
        micro_step(engine)
    assert engine.get_lr() != before


def test_a_client_optimizer_is_named_by_its_class():
    model = Model()
    mine = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.7)
    engine = start(model=model, optimizer=mine, config={"optimizer": None, "scheduler": None})
    assert engine.optimizer is mine
    assert engine.optimizer_name() == "SGD"
    assert engine.get_mom() == [0.7]
    assert [len(group["params"]) for group in mine.param_groups] == [2], "frozen ones are left out"


def test_an_engine_without_optimizer_answers_too():
    engine = start(config={"optimizer": None, "scheduler": None})
    assert engine.optimizer is None
    assert engine.optimizer_name() is None
    assert engine.get_lr() == engine.get_mom() == []
    assert engine.report()["optimizer"] == "none"
    engine.module.inner.weight.grad = torch.ones(1, 3)
    engine.zero_grad()
    assert engine.module.inner.weight.grad is None
    for call, arguments in (("backward", (torch.ones(1),)), ("step", ())):
        with pytest.raises(EngineError, match="has no optimizer") as caught:
            getattr(engine, call)(*arguments)
        assert caught.value.where == f"engine.{call}"


def test_counters_move_with_steps():
    engine = start()
    seen = []
    for _ in range(6):
        assert engine.was_step_applied() is (engine.micro_steps in (3, 6))
        micro_step(engine)
        seen.append((engine.micro_steps, engine.global_steps, engine.global_samples, engine.skipped_steps))
    assert seen == [(1, 0, 0, 0), (2, 0, 0, 0), (3, 1, 6, 0), (4, 1, 6, 0), (5, 1, 6, 0), (6, 2, 12, 0)]


def test_the_norm_is_that_before_clipping():
    engine = start(config={"gradient_accumulation_steps": 1, "gradient_clipping": 1e-4})
    assert engine.get_global_grad_norm() is None
    loss = engine(torch.ones(2, 3))
    expected = torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(engine.module.inner.parameters()))]
    ).norm()
    micro_step(engine)
    assert engine.get_global_grad_norm() == pytest.approx(expected.item(), rel=1e-5)
    assert engine.gradient_clipping() == 1e-4


def test_ranks_and_configuration():
    engine = start()
    assert (engine.global_rank, engine.local_rank, engine.world_size, engine.dp_world_size) == (0, 0, 1, 1)
    assert comm.get_world_size(engine.data_parallel_group) == 1
    assert engine.steps_per_print() == 7
    assert engine.cur_scale == 1.0
    assert (engine.fp16_enabled(), engine.bfloat16_enabled()) == (False, False)
    assert engine.zero_optimization_stage() == 0
    for name in ("zero_optimization", "zero_optimization_partition_gradients", "zero_optimization_partition_weights"):
        assert getattr(engine, name)() is False


def test_the_batch_size_can_change_at_a_boundary():
    engine = start()
    assert engine.get_batch_info() == (6, 2, 3)
    micro_step(engine)
    with pytest.raises(EngineError, match="inside an accumulation window") as caught:
        engine.set_train_batch_size(8)
    assert caught.value.where == "micro-batch 1"
    micro_step(engine)
    micro_step(engine)
    assert engine.global_steps == 1
    engine.set_train_batch_size(4)
    assert engine.get_batch_info() == (4, 2, 2)
    boundaries = []
    for _ in range(4):
        boundaries.append(engine.is_gradient_accumulation_boundary())
        micro_step(engine)
    assert boundaries == [False, True] * 2
    assert (engine.global_steps, engine.global_samples) == (3, 6 + 4 + 4)


@pytest.mark.parametrize("size", [0, -2, 3, 7])
def test_a_batch_size_that_does_not_divide_is_refused(size):
    engine = start()
    with pytest.raises(ConfigError, match=f"train_batch_size {size} is not a multiple of 2 samples x 1 ranks = 2"):
        engine.set_train_batch_size(size)
    assert engine.train_batch_size() == 6


def test_the_caller_can_say_where_a_window_ends():
    engine = start()
    for ends in (False, False, False, True, True):
        engine.set_gradient_accumulation_boundary(ends)
        assert engine.is_gradient_accumulation_boundary() is ends
        micro_step(engine)
    assert engine.global_steps == 2
    assert engine.micro_steps == 5
    engine.set_gradient_accumulation_boundary(None)
    # A whole window from there: each gradient in it was divided by its three micro-batches.
    for steps in (2, 2, 3):
        micro_step(engine)
        assert engine.global_steps == steps


def test_a_boundary_said_after_the_backward_counts_for_the_step():
    engine = start()
    engine.backward(engine(torch.ones(2, 3)))
    engine.set_gradient_accumulation_boundary(True)
    engine.step()
    assert engine.global_steps == 1


def test_names_the_engine_does_not_have_are_the_modules():
    engine = start()
    assert engine.answer == 42
    assert engine.greet() == "hello"
    assert engine.inner is engine.module.inner
    with pytest.raises(AttributeError, match="no_such_name"):
        engine.no_such_name  # noqa: B018
    assert not hasattr(engine, "no_such_name")


@pytest.mark.parametrize("name", EngineFace._LATER)
def test_names_that_come_later_say_so(name):
    engine = start()
    with pytest.raises(NotBuiltError, match=f"engine.{name} is not built yet") as caught:
        getattr(engine, name)
    assert caught.value.fix
    assert not hasattr(engine, name)


def test_modes_return_the_engine_and_reach_the_module():
    engine = start()
    assert engine.eval() is engine
    assert not engine.module.drop.training
    assert engine.train() is engine
    assert engine.module.drop.training
    assert engine.train(False) is engine
    assert not engine.training


def test_state_dicts_are_the_modules():
    engine = start()
    state = engine.module_state_dict()
    assert state.keys() == engine.module.state_dict().keys()
    assert "inner.weight" in state
    trained = engine.module_state_dict(exclude_frozen_parameters=True)
    assert set(state) - set(trained) == {"frozen.weight", "frozen.bias"}
    assert set(engine.module_state_dict(prefix="p.", exclude_frozen_parameters=True)) == {
        f"p.{name}" for name in trained
    }
    new = {name: torch.full_like(value, 3.0) for name, value in state.items()}
    engine.load_module_state_dict({"module": new})
    assert all(torch.equal(value, new[name]) for name, value in engine.module_state_dict().items())
    with pytest.raises(RuntimeError, match="Missing key"):
        engine.load_module_state_dict({"module": {}})
    engine.load_module_state_dict({"module": {}}, strict=False)


def test_zero_grad_forgets_what_the_window_has():
    engine = start(config={"gradient_accumulation_steps": 2, "gradient_clipping": 0.0})
    engine.backward(engine(torch.full((2, 3), 50.0)))
    engine.step()
    engine.zero_grad()
    micro_step(engine)
    loss = engine(torch.ones(2, 3)) / 2
    assert engine.global_steps == 1, "the window itself went on"
    assert loss.isfinite()
    assert engine.get_global_grad_norm() < 50


def test_compile_is_in_place_and_once():
    engine = start(config={"gradient_accumulation_steps": 1})
    assert engine.is_compiled is False
    called = []

    def backend(graph, inputs):
        called.append(len(inputs))
        return graph.forward

    engine.compile(backend=backend, compile_kwargs={"dynamic": False})
    assert engine.is_compiled is True
    engine.compile(backend="no such backend")
    micro_step(engine)
    micro_step(engine)
    assert len(called) == 1
    assert engine.global_steps == 2


def test_the_report_says_what_is_at_work():
    report = start().report()
    assert all(isinstance(text, str) for item in report.items() for text in item)
    assert report["precision"] == "Fp32"
    assert report["partition"] == "ReplicatedPartition"
    assert report["optimizer"] == "AdamW"
    assert report["checkpoint"] in (
        "PlainCheckpoint, the default without ds-ckpt",
        "ShardedCheckpoint, the default where ds-ckpt is installed",
    )
    assert report["clipping"].startswith("norm above 0.5")
    assert report["gradient factor"] == "applied by the fused update, in its own pass"
    other = start(config={"gradient_clipping": 0.0, "optimizer": {"type": "RMSprop"}, "scheduler": None}).report()
    assert other["clipping"].startswith("off")
    assert other["gradient factor"] == "one multiplication before the update, skipped at 1"


def test_loaders_are_made_for_any_dataset():
    engine = start()
    data = [torch.full((3,), float(index)) for index in range(10)]
    assert [len(batch) for batch in engine.deepspeed_io(data)] == [2] * 5
    assert [len(batch) for batch in engine.deepspeed_io(data, batch_size=5)] == [5, 5]
    in_order = torch.cat(list(engine.deepspeed_io(data, route="eval")))
    assert in_order[:, 0].tolist() == [float(index) for index in range(10)]
    assert engine.deepspeed_io(data, collate_fn=len).__iter__().__next__() == 2


def test_a_checkpoint_round_trip_returns_path_and_client_state(tmp_path, caplog):
    engine = start()
    for _ in range(3):
        micro_step(engine)
    with caplog.at_level(logging.INFO, "ds_core"):
        assert engine.save_checkpoint(tmp_path, client_state={"run": (1, {2: "x"})}) is True
    assert (tmp_path / "latest").read_text() == "global_step1"
    other = start()
    path, client_state = other.load_checkpoint(str(tmp_path))
    assert path == str(tmp_path / "global_step1")
    assert client_state == {"run": (1, {2: "x"})}
    assert other.global_steps == 1
    assert engine.save_checkpoint(tmp_path, tag=9, save_latest=False)
    assert (tmp_path / "latest").read_text() == "global_step1"
    assert (tmp_path / "9").is_dir()


def test_frozen_weights_can_be_left_out(tmp_path):
    engine = start()
    engine.save_checkpoint(tmp_path, exclude_frozen_parameters=True)
    other = start()
    with torch.no_grad():
        other.module.frozen.weight.fill_(7.0)
    other.load_checkpoint(tmp_path)
    assert other.module.frozen.weight.unique().tolist() == [7.0]
    assert torch.equal(other.module.inner.weight, engine.module.inner.weight)


def test_a_custom_function_may_load_the_weights(tmp_path):
    engine = start()
    engine.save_checkpoint(tmp_path)
    seen = {}

    def load(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
        seen.update(src)
        dst.load_state_dict(src)

    other = start()
    with torch.no_grad():
        other.module.inner.weight.zero_()
    other.load_checkpoint(tmp_path, custom_load_fn=load, load_module_only=True)
    assert seen.keys() == engine.module.state_dict().keys()
    assert torch.equal(other.module.inner.weight, engine.module.inner.weight)


def test_signatures_are_deepspeeds():
    def names(call: str) -> list[str]:
        return list(inspect.signature(getattr(EngineFace, call)).parameters)[1:]

    assert names("save_checkpoint") == ["save_dir", "tag", "client_state", "save_latest", "exclude_frozen_parameters"]
    assert names("load_checkpoint")[:4] == ["load_dir", "tag", "load_module_strict", "load_optimizer_states"]
    assert names("load_checkpoint")[4:] == ["load_lr_scheduler_states", "load_module_only", "custom_load_fn"]
    assert names("compile") == ["backend", "compile_kwargs"]


def test_a_destroyed_engine_leaves_its_progress_and_its_model(tmp_path):
    engine = start()
    for _ in range(3):
        micro_step(engine)
    engine.destroy()
    assert engine.global_steps == 1
    assert engine.module(torch.ones(2, 3)).item() > 0
    assert engine.module_state_dict().keys() == engine.module.state_dict().keys()
    with pytest.raises(EngineError, match="was destroyed") as caught:
        engine.save_checkpoint(tmp_path)
    assert "make a new one" in caught.value.fix
